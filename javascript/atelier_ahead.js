/* What lies ahead of a start: what the data folder holds, the file that is written, steps, time and memory. */
(function () {
    "use strict";

    const Atelier = (window.Atelier = window.Atelier || {});
    const FOLDER_KEYS = ["lora_data_directory", "mode", "train_batch_size", "image_size(height, width)"];
    const ahead = (Atelier.ahead = {});
    let cost = null;
    let inFolder = null;

    /** Show what the settings that were just checked will do. `current`: whether they are still those of the form. */
    ahead.look = async (answer, current) => {
        const { $, say, form } = Atelier;
        const file = `${form.value("save_lora_name").trim() || "untitled"}.safetensors`;
        say($("writes"), answer.problems.length ? "" : "Writes {file}", { file });
        cost = answer.cost || null;
        showCost();
        await lookIntoFolder(current);
        if (current()) showCost();
    };

    // ------------------------------------------------------------ steps, time, memory

    function showCost() {
        const { t, say, $, duration, gigabytes } = Atelier;
        const parts = [];
        const steps = cost && (cost.steps === null ? inFolder && inFolder.steps : cost.steps);
        if (cost && steps) parts.push(t("{n} steps", { n: steps }));
        if (cost && cost.per_step === null) parts.push(t("how long that takes is known after the first run of this kind"));
        else if (cost && typeof steps === "number") {
            parts.push(t("about {time} as last time", { time: duration(cost.before + steps * cost.per_step) }));
        }
        if (cost && cost.memory_mb) parts.push(t("about {n} GB of memory", { n: gigabytes(cost.memory_mb) }));
        say($("cost"), parts.length ? "{text}" : "", { text: parts.join(" · ") });
    }

    // ------------------------------------------------------------ the data folder

    /** What the data folder holds, asked for when one of the settings it depends on changed. */
    async function lookIntoFolder(current) {
        const { ask, say, form } = Atelier;
        const field = form.fields.find((one) => one.holds === "folder" && one.shown);
        if (!field) return;
        const wished = form.fields.filter((one) => one.shown && !one.second);
        const images = wished.filter((one) => FOLDER_KEYS.includes(one.key) || /^(image|sub_image|data|diff_target|train_(epochs|iterations|gradient_accumulation))/.test(one.key));
        const key = JSON.stringify(images.map(form.read));
        if (field.note.dataset.key === key) return;
        field.note.dataset.key = key;
        inFolder = null;
        if (!form.read(field).trim()) return say(field.note, "");
        try {
            const found = await ask("POST", "folder", { settings: form.settings() });
            if (current()) say(field.note, folderWords((inFolder = found)));
        } catch {
            if (current()) say(field.note, ""); // what is wrong with it stands below, in red
        }
        if (!current()) delete field.note.dataset.key;
    }

    function text(value) {
        if (Array.isArray(value)) return value.map(text).join(", ");
        if (value && typeof value === "object") return Object.entries(value).map((pair) => pair.map(text).join(": ")).join(", ");
        return value === null ? "" : String(value);
    }

    const LABELS = { pictures: "images" }; // where the name in the answer is not the word that is shown

    function folderWords(found) {
        const rows = Object.entries(found).filter(([, value]) => text(value) !== "");
        return rows.map(([name, value]) => `${Atelier.t(LABELS[name] || name)}: ${text(value)}`).join(" · ");
    }

    // ------------------------------------------------------------ what cannot be chosen

    /** Mark values that the installed packages cannot serve, with what to do about it. */
    ahead.markUnserved = async () => {
        const { unserved } = await Atelier.ask("GET", "schema");
        for (const field of Atelier.form.fields) {
            const why = unserved[field.key] || {};
            for (const option of field.input.options || []) mark(option, option.value in why, why[option.value]);
            for (const box of field.kind === "checks" ? field.input.querySelectorAll("input") : []) {
                mark(box.closest("label"), box.value in why, why[box.value]);
            }
        }
    };

    function mark(element, is, why) {
        element.classList.toggle("atelier-unserved", is);
        element.title = is ? why : "";
        if (element.localName !== "option") return;
        element.textContent = is ? `${element.value} (${Atelier.t("not installed")})` : element.value;
    }

    /** What a run told before its first step, as rows of a list: `report` are pairs of name and value. */
    ahead.showReport = (report) => {
        const box = Atelier.$("report");
        const key = JSON.stringify(report);
        box.hidden = !report.length;
        if (box.dataset.shown === key) return;
        box.dataset.shown = key;
        const rows = report.filter(([, value]) => text(value) !== "").flatMap(([name, value]) => {
            const pair = [document.createElement("dt"), document.createElement("dd")];
            Atelier.say(pair[0], name);
            pair[1].textContent = text(value);
            return pair;
        });
        box.querySelector("dl").replaceChildren(...rows);
    };

    document.addEventListener("atelier:language", showCost);
})();
