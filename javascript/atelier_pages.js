/* The plot page, the picture tools, and pictures drawn with and without a LoRA. */
(function () {
    "use strict";

    const Atelier = (window.Atelier = window.Atelier || {});
    const PLOT_AGAIN = 5000;
    const pages = (Atelier.pages = {});
    const chosen = new Set();
    const dropped = [];
    let plotted = 0;
    let plotWait = 0;

    // ------------------------------------------------------------ pages

    pages.show = (name) => {
        for (const tab of Atelier.root().querySelectorAll("[role=tab]")) {
            const mine = tab.dataset.page === name;
            tab.setAttribute("aria-selected", String(mine));
            tab.tabIndex = mine ? 0 : -1;
            Atelier.$("page_" + tab.dataset.page).hidden = !mine;
        }
        Atelier.$("bar").hidden = name !== "train";
        pages.current = name;
        if (name === "plot") refreshLogs().then(plot, plot);
    };

    function onTabKey(event) {
        const tabs = [...Atelier.root().querySelectorAll("[role=tab]")];
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (!step) return;
        const next = tabs[(tabs.indexOf(event.target) + step + tabs.length) % tabs.length];
        next.focus();
        pages.show(next.dataset.page);
    }

    // ------------------------------------------------------------ plot

    async function refreshLogs() {
        const answer = await Atelier.ask("GET", "logs");
        for (const name of [...chosen]) if (!answer.logs.includes(name)) chosen.delete(name);
        Atelier.$("plot_logs").replaceChildren(...answer.logs.map((name) => logItem(name)));
    }

    function logItem(name) {
        const [item, label, box, text] = ["li", "label", "input", "span"].map((tag) => document.createElement(tag));
        box.type = "checkbox";
        box.value = name;
        box.checked = chosen.has(name);
        box.addEventListener("change", () => {
            if (box.checked) chosen.add(name);
            else chosen.delete(name);
            plot();
        });
        text.textContent = name.replace(/\.csv$/, "");
        text.title = name;
        label.append(box, text);
        item.append(label);
        return item;
    }

    /** Have the figure drawn; wishes that come while one is being drawn are joined to one more. */
    async function plot() {
        if (plotWait) {
            plotWait = 2;
            return;
        }
        plotWait = 1;
        plotted = Date.now();
        const { $, say } = Atelier;
        const error = $("plot_smooth_error");
        try {
            say($("plot_note"), $("plot_figure").firstChild ? "" : "Drawing …");
            const answer = await Atelier.ask("POST", "plot", {
                logs: [...chosen],
                dropped,
                smoothing: $("plot_smooth").value,
                logarithmic: $("plot_log").checked,
                rates: $("plot_rates").checked,
            });
            $("plot_figure").innerHTML = answer.svg;
            say($("plot_note"), "{names}", { names: answer.shown.join(" · ") });
            error.hidden = true;
        } catch (fault) {
            error.hidden = !(fault.problems || []).length;
            error.textContent = error.hidden ? "" : fault.problems.map((one) => one.message).join(" ");
            if (error.hidden) {
                say($("plot_note"), fault.message);
                $("plot_figure").replaceChildren();
            }
        }
        const again = plotWait === 2;
        plotWait = 0;
        if (again) plot();
    }

    async function dropLog(file) {
        dropped.push({ name: file.name, text: await file.text() });
        plot();
    }

    // ------------------------------------------------------------ picture tools

    const FIELDS = {
        augment: ["source", "output", "copies", "angle", "scale", "side", "seed", "captions"],
        resize: ["source", "output", "resolutions", "divisible", "interpolation", "png", "associated"],
    };

    function valuesOf(prefix, names) {
        return Object.fromEntries(names.map((name) => {
            const input = Atelier.$(`${prefix}_${name}`);
            return [name, input.type === "checkbox" ? input.checked : input.value];
        }));
    }

    /** Put problems at the inputs of a tool; what has no input goes to its note. */
    function showProblems(prefix, names, error) {
        const rest = [];
        for (const name of names) {
            const place = Atelier.$(`${prefix}_${name}_error`);
            if (place) [place.hidden, place.textContent] = [true, ""];
        }
        for (const problem of (error && error.problems) || []) {
            const place = Atelier.$(`${prefix}_${problem.field}_error`);
            if (!place) rest.push(`${problem.field}: ${problem.message}`);
            else [place.hidden, place.textContent] = [false, `${place.textContent} ${problem.message}`.trim()];
        }
        if (error && !(error.problems || []).length) rest.push(error.message);
        return rest.join("\n");
    }

    function figure(source, text) {
        const item = Atelier.copyOf("figure");
        item.querySelector("img").src = source;
        item.querySelector("img").alt = text;
        item.querySelector("figcaption").textContent = text;
        return item;
    }

    function startTool(tool) {
        const { $, say, onClick } = Atelier;
        const note = $(`${tool}_note`);
        const work = async (path, use) => {
            say(note, "Working …");
            try {
                use(await Atelier.ask("POST", path, valuesOf(tool, FIELDS[tool])));
                showProblems(tool, FIELDS[tool]);
            } catch (error) {
                say(note, showProblems(tool, FIELDS[tool], error));
            }
        };
        onClick($(`${tool}_preview`), () => work(`images/${tool}/preview`, (answer) => {
            $(`${tool}_grid`).replaceChildren(...answer.pictures.map((one) => figure(one.data, `${one.name} · ${one.size}`)));
            say(note, "Nothing is written yet.");
        }));
        onClick($(`${tool}_write`), () => work(`images/${tool}`, (answer) => {
            say(note, "{n} images written to {folder}", { n: answer.written, folder: answer.folder });
            $(`${tool}_train`).hidden = false;
            $(`${tool}_train`).dataset.folder = answer.folder;
        }));
        $(`${tool}_train`).addEventListener("click", (event) => {
            Atelier.form.set("lora_data_directory", event.currentTarget.dataset.folder);
            pages.show("train");
        });
    }

    // ------------------------------------------------------------ before and after

    const OF_THE_MODEL = ["model", "vae", "te", "model_v_pred", "model_zero_terminal_snr", "train_clip_skip"];
    const TRY = ["prompt", "negative", "seed", "steps", "cfg", "width", "height", "lora", "strengths"];

    function promptOf(kind) {
        const own = Atelier.$("try_prompt").value.trim();
        const line = (key) => String(Atelier.form.value(key) || "").split("\n")[0];
        if (kind === "original") return line("original prompt");
        if (kind === "target") return line("target prompt");
        return own || line("original prompt") || line("sample_prompts") || Atelier.form.value("lora_trigger_word") || "";
    }

    /** Draw one picture after the other into the grid; `wishes` are {label, prompt, strength}. */
    async function drawAll(wishes) {
        const { $, say } = Atelier;
        const { strengths, ...values } = valuesOf("try", TRY);
        const grid = $("draw_grid");
        say($("draw_note"), showProblems("try", TRY));
        $("try").open = true;
        $("try").scrollIntoView({ block: "nearest" });
        grid.replaceChildren();
        $("draw_save").hidden = true;
        for (const [index, wish] of wishes.entries()) {
            say($("draw_note"), "Generating {n} of {all} …", { n: index + 1, all: wishes.length });
            const { strengths, ...body } = { ...values, prompt: wish.prompt, lora: wish.lora || "" };
            body.strength = String(wish.strength);
            for (const key of OF_THE_MODEL) {
                const value = Atelier.form.value(key);
                if (value !== "") body[key] = value;
            }
            try {
                const picture = await Atelier.ask("POST", "picture", body);
                const drawn = figure(picture.data, wish.label);
                grid.append(drawn);
                const image = drawn.querySelector("img");
                image.loading = "eager"; // below the window it would never be decoded
                await image.decode().catch(() => null);
                drawn.scrollIntoView({ block: "nearest" });
            } catch (error) {
                say($("draw_note"), showProblems("try", TRY, error));
                return;
            }
        }
        say($("draw_note"), "{prompt}", { prompt: wishes.map((wish) => wish.prompt).filter((p, i, all) => all.indexOf(p) === i).join(" → ") });
        $("draw_save").hidden = false;
    }

    function original() {
        return { label: Atelier.t("Original"), prompt: promptOf("original"), strength: 0 };
    }

    function target() {
        return { label: Atelier.t("Target"), prompt: promptOf("target"), strength: 0 };
    }

    async function compare() {
        const lora = Atelier.$("try_lora").value;
        const strengths = Atelier.$("try_strengths").value.split(",").map((part) => part.trim()).filter(Boolean);
        const place = Atelier.$("try_strengths_error");
        const right = strengths.length > 0 && strengths.length <= 12 && strengths.every((one) => Number.isFinite(Number(one)));
        place.hidden = right;
        place.textContent = right ? "" : Atelier.t("must be up to 12 numbers with commas between them, as in -1, 0, 0.5, 1.");
        const missing = Atelier.$("try_lora_error");
        missing.hidden = Boolean(lora);
        missing.textContent = lora ? "" : Atelier.t("Choose the LoRA to compare with.");
        if (!right || !lora) return;
        const prompt = promptOf("compare");
        await drawAll(strengths.map((strength) => ({ label: strength, prompt, strength, lora })));
    }

    /** Seed, steps, size and negative prompt of the WebUI's own txt2img tab. */
    function takeFromHost() {
        const names = { steps: "steps", cfg: "cfg_scale", width: "width", height: "height", seed: "seed" };
        for (const [ours, theirs] of Object.entries(names)) {
            const box = document.querySelector(`#txt2img_${theirs} input[type=number]`);
            if (box && !(ours === "seed" && Number(box.value) < 0)) Atelier.$("try_" + ours).value = box.value;
        }
        const negative = document.querySelector("#txt2img_neg_prompt textarea");
        if (negative) Atelier.$("try_negative").value = negative.value;
    }

    /** The grid as one PNG, drawn side by side with its labels. */
    function saveGrid() {
        const figures = [...Atelier.$("draw_grid").querySelectorAll("figure")];
        const pictures = figures.map((one) => one.querySelector("img"));
        const [wide, high, line] = [pictures[0].naturalWidth, pictures[0].naturalHeight, 24];
        const sheet = document.createElement("canvas");
        [sheet.width, sheet.height] = [wide * figures.length, high + line];
        const pen = sheet.getContext("2d");
        const style = getComputedStyle(Atelier.root());
        pen.fillStyle = style.getPropertyValue("--background-fill-primary") || "white";
        pen.fillRect(0, 0, sheet.width, sheet.height);
        pen.fillStyle = style.color;
        pen.font = "14px " + style.fontFamily;
        figures.forEach((one, index) => {
            pen.drawImage(pictures[index], index * wide, line);
            pen.fillText(one.querySelector("figcaption").textContent, index * wide + 4, 16);
        });
        const link = document.createElement("a");
        link.download = "compare.png";
        link.href = sheet.toDataURL("image/png");
        link.click();
    }

    /** Open the card with the LoRA that was just written and draw it at all strengths. */
    async function compareNow() {
        const name = Atelier.live.status.run.lora;
        await Atelier.form.refreshLists(false);
        const list = Atelier.$("try_lora");
        if (![...list.options].some((option) => option.value === name)) list.add(new Option(name, name));
        list.value = name;
        const size = String(Atelier.form.value("image_size(height, width)") || "").split(",");
        if (size[0]) {
            Atelier.$("try_height").value = size[0].trim();
            Atelier.$("try_width").value = (size[1] || size[0]).trim();
        }
        const card = Atelier.$("try");
        card.open = true;
        card.scrollIntoView({ block: "nearest", behavior: "smooth" });
        await compare();
    }

    pages.start = () => {
        const { $, onClick } = Atelier;
        for (const tab of Atelier.root().querySelectorAll("[role=tab]")) {
            tab.addEventListener("click", () => pages.show(tab.dataset.page));
            tab.addEventListener("keydown", onTabKey);
        }
        for (const name of ["plot_log", "plot_rates", "plot_smooth"]) $(name).addEventListener("change", plot);
        onClick($("plot_refresh"), async () => {
            dropped.length = 0;
            await refreshLogs();
            await plot();
        }, $("plot_note"));
        Atelier.settings.dropOn($("page_plot"), dropLog);
        Object.keys(FIELDS).forEach(startTool);
        onClick($("draw_original"), () => drawAll([original()]));
        onClick($("draw_target"), () => drawAll([target()]));
        onClick($("draw_both"), () => drawAll([original(), target()]));
        onClick($("draw_compare"), compare);
        onClick($("draw_save"), saveGrid);
        onClick($("compare_now"), compareNow, $("draw_note"));
        $("draw_take").hidden = !document.querySelector("#txt2img_steps");
        $("draw_take").addEventListener("click", takeFromHost);
        pages.show("train");
    };

    document.addEventListener("atelier:status", (event) => {
        const busy = event.detail.state === "running";
        if (pages.current === "plot" && busy && Date.now() - plotted > PLOT_AGAIN) plot();
    });
})();
