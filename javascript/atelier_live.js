/* The run as it goes: one poll a second while it runs, one in three seconds else, none while nobody looks. */
(function () {
    "use strict";

    const Atelier = (window.Atelier = window.Atelier || {});
    const BUSY = ["preparing", "running", "stopping"];
    const EACH = 1000;
    const EACH_IDLE = 3000;
    const LINES = 300;
    const [WIDE, HIGH] = [300, 90];
    const STATES = {
        idle: "Idle", preparing: "Preparing", running: "Training", stopping: "Stopping",
        finished: "Finished", failed: "Failed",
    };

    const live = (Atelier.live = { status: null });
    let run = "";
    let curve = [];
    let curveNext = 0;
    let logNext = 0;
    let polling = false;
    let last = 0;
    let waitsFor = "";
    let told = null;
    let title = null;
    let queueShown = "";

    // ------------------------------------------------------------ asking

    async function poll() {
        if (polling) return;
        polling = true;
        last = Date.now();
        try {
            const query = `status?log=${logNext}&curve=${curveNext}&run=${encodeURIComponent(run)}`;
            show(await Atelier.ask("GET", query));
        } catch (error) {
            Atelier.say(Atelier.$("live_state"), error.message);
        } finally {
            polling = false;
        }
    }

    function tick() {
        const busy = live.status && BUSY.includes(live.status.state);
        if (Atelier.isSeen() && Date.now() - last >= (busy ? EACH : EACH_IDLE) - 50) poll();
    }

    /** Ask now, for instance after a button was pressed. */
    live.now = () => poll();

    /** One request that the server answers when the run is over, so that nobody has to ask while the tab is hidden. */
    async function waitFor(id) {
        if (waitsFor === id) return;
        waitsFor = id;
        try {
            const answer = await Atelier.ask("GET", "finished?run=" + encodeURIComponent(id));
            if (answer && answer.reason) announce(id, answer);
        } catch {
            /* the next poll tells */
        } finally {
            waitsFor = "";
        }
    }

    // ------------------------------------------------------------ showing

    function show(status) {
        live.status = status;
        if (status.run !== run) {
            run = status.run || "";
            curve = [];
            Atelier.$("log").replaceChildren();
        }
        showState(status);
        showFacts(status);
        if (status.curve && status.curve.length) curve.push(...status.curve);
        if (status.curve_next !== undefined) {
            if (status.curve_next < curveNext) curve = status.curve || [];
            curveNext = status.curve_next;
        }
        showCurve();
        showLog(status.log || [], status.log_next);
        showSamples(status.samples);
        showResult(status);
        showQueue(status.queue || []);
        showTitle(status);
        const banner = Atelier.$("banner");
        banner.hidden = !status.banner;
        Atelier.say(banner, status.banner || "");
        if (BUSY.includes(status.state) && status.run) waitFor(status.run);
        document.dispatchEvent(new CustomEvent("atelier:status", { detail: status }));
    }

    function showState(status) {
        const state = Atelier.$("live_state");
        Atelier.say(state, STATES[status.state] || status.state);
        state.dataset.state = status.state;
        const job = status.job || {};
        Atelier.say(Atelier.$("live_job"), job.name ? "{name}" : "", { name: [job.name, job.mode].join(" · ") });
        const stoppable = ["preparing", "running"].includes(status.state);
        for (const name of ["stop", "stop_save"]) Atelier.$(name).disabled = !stoppable;
        const stage = status.stage;
        const words = stage ? ["{name}: {done} / {total}", { ...stage, name: Atelier.t(stage.name) }] : [""];
        Atelier.say(Atelier.$("live_stage"), ...words);
        const bar = Atelier.$("progress");
        const share = stage ? stage.done / Math.max(stage.total, 1) : (status.step || 0) / Math.max(status.total || 0, 1);
        if (status.state === "preparing" && !stage) bar.removeAttribute("value");
        else bar.value = Math.round(share * 1000);
    }

    function showFacts(status) {
        const { number, duration, gigabytes } = Atelier;
        const put = (name, text) => {
            const element = Atelier.$("live_" + name);
            if (element.textContent !== text) element.textContent = text;
        };
        const whole = status.total ? ` / ${status.total}` : "";
        put("step", status.total ? `${status.step || 0}${whole}` : "–");
        put("loss", number(status.loss_ema));
        put("rate", (status.rates || []).length ? [...new Set(status.rates.map(number))].join(" · ") : "–");
        const each = status.seconds_per_step;
        put("speed", each ? (each < 1 ? `${number(each * 1000)} ms` : `${number(each)} s`) : "–");
        put("left", BUSY.includes(status.state) ? duration(status.seconds_left) : "–");
        const memory = status.memory;
        const of = memory && memory.total ? ` / ${gigabytes(memory.total)}` : "";
        put("memory", memory ? `${gigabytes(memory.used)}${of} GB` : "–");
    }

    /** The losses as two paths: at most one point per unit of width, scaled to what most of them are. */
    function showCurve() {
        const box = Atelier.$("curve");
        box.classList.toggle("atelier-empty", curve.length < 2);
        const stride = Math.ceil(curve.length / WIDE) || 1;
        const points = curve.filter((point, index) => index % stride === 0 || index === curve.length - 1);
        const sorted = points.map((point) => point[1]).filter(Number.isFinite).sort((a, b) => a - b);
        if (!sorted.length) return;
        const at = (share) => sorted[Math.min(Math.floor(share * sorted.length), sorted.length - 1)];
        const smooth = points.map((point) => point[2]).filter(Number.isFinite);
        let [low, high] = [Math.min(at(0.02), ...smooth), Math.max(at(0.98), ...smooth)];
        if (high - low < 1e-12) [low, high] = [low - 0.5, high + 0.5];
        const [first, end] = [points[0][0], points[points.length - 1][0]];
        const x = (step) => ((step - first) / Math.max(end - first, 1)) * WIDE;
        const y = (value) => HIGH - 3 - (Math.min(Math.max((value - low) / (high - low), 0), 1) * (HIGH - 6));
        const path = (column) => points
            .filter((point) => Number.isFinite(point[column]))
            .map((point, index) => `${index ? "L" : "M"}${x(point[0]).toFixed(1)} ${y(point[column]).toFixed(1)}`)
            .join("");
        box.querySelector(".atelier-line-raw").setAttribute("d", path(1));
        box.querySelector(".atelier-line-ema").setAttribute("d", path(2));
        Atelier.$("curve_high").textContent = Atelier.number(high);
        Atelier.$("curve_low").textContent = Atelier.number(low);
    }

    function showLog(lines, next) {
        if (next !== undefined) logNext = next;
        if (!lines.length) return;
        const list = Atelier.$("log");
        const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 30;
        for (const line of lines) {
            const item = document.createElement("li");
            item.textContent = line.text;
            item.dataset.level = line.level;
            item.title = new Date(line.at * 1000).toLocaleTimeString();
            list.append(item);
        }
        while (list.children.length > LINES) list.firstChild.remove();
        if (atEnd) list.scrollTop = list.scrollHeight;
    }

    function showSamples(samples) {
        const box = Atelier.$("samples");
        const files = samples ? samples.files : [];
        box.hidden = !files.length;
        const key = files.join("\n");
        if (box.dataset.shown === key) return;
        box.dataset.shown = key;
        box.replaceChildren(...files.map((file) => {
            const link = document.createElement("a");
            link.href = Atelier.BASE + file;
            link.target = "_blank";
            const picture = document.createElement("img");
            picture.src = link.href;
            picture.alt = Atelier.t("Sample of step {n}", { n: samples.step });
            link.append(picture);
            return link;
        }));
    }

    function showResult(status) {
        const done = BUSY.includes(status.state) ? null : status.finished;
        const box = Atelier.$("result");
        box.hidden = !done;
        if (!done) return;
        const file = done["file name"];
        const words = {
            done: "Written: {file}", saved_early: "Stopped and written: {file}", stopped: "Stopped, nothing written.",
            failed: "{error}",
        };
        const key = JSON.stringify([status.run, done]);
        box.dataset.reason = done.reason;
        if (box.dataset.shown === key) return;
        box.dataset.shown = key;
        Atelier.say(Atelier.$("result_text"), words[done.reason] || "{error}", { file, error: done.error || done.reason });
        for (const name of ["open_loras", "compare_now"]) Atelier.$(name).hidden = !done.path;
        Atelier.$("use_in_prompt").hidden = !done.path || !promptBox();
        if (done.path) Atelier.form.refreshLists(false).catch(() => null);
        if (done.problems && done.problems.length) Atelier.form.show(done.problems, [], true);
        announce(status.run, done);
    }

    // ------------------------------------------------------------ title and notification

    function showTitle(status) {
        if (status.state === "running" && status.total) {
            if (title === null) title = document.title;
            document.title = `[${Math.floor((100 * (status.step || 0)) / status.total)}%] ${title}`;
        } else if (title !== null && !BUSY.includes(status.state)) {
            document.title = title;
            title = null;
        }
    }

    /** Say once that a run is over: a mark in the title until somebody looks, a notification where that is allowed. */
    function announce(id, done) {
        if (told === id) return;
        const first = told === null && Atelier.isSeen();
        told = id;
        if (first || document.visibilityState === "visible") return;
        const words = done.reason === "failed" ? "Training failed" : "Training finished";
        title = title === null ? document.title : title;
        document.title = `${done.reason === "failed" ? "✗" : "✓"} ${title}`;
        if (window.Notification && Notification.permission === "granted") {
            const text = done["file name"] || done.error || "";
            new Notification(Atelier.t(words), { body: text, tag: "atelier" });
        }
    }

    // ------------------------------------------------------------ the queue

    const QUEUE_ACTIONS = {
        waiting: ["now", "up", "down", "delete"], running: [], failed: ["delete"], "broken off": ["resume", "forget"],
    };
    const QUEUE_WORDS = { running: "running", failed: "failed", "broken off": "broken off", waiting: "" };

    function showQueue(queue) {
        const text = JSON.stringify(queue);
        if (text === queueShown) return;
        queueShown = text;
        const list = Atelier.$("queue");
        const open = new Set([...list.querySelectorAll("details[open]")].map((box) => box.closest("li").dataset.id));
        list.replaceChildren(...queue.map((entry, index) => entryOf(entry, index, open.has(entry.id))));
        Atelier.$("queue_empty").hidden = queue.length > 0;
    }

    function entryOf(entry, index, open) {
        const item = Atelier.copyOf("queue");
        item.dataset.id = entry.id;
        item.dataset.state = entry.state;
        item.querySelector("details").open = open;
        item.querySelector("[data-name]").textContent = entry.name;
        const about = [entry.mode, entry.model, Atelier.t(QUEUE_WORDS[entry.state] || "")].filter(Boolean);
        item.querySelector("[data-about]").textContent = about.join(" · ");
        const rows = Object.entries(entry.settings || {}).flatMap(([key, value]) => {
            const [name, text] = [document.createElement("dt"), document.createElement("dd")];
            name.textContent = key.replaceAll("_", " ");
            text.textContent = typeof value === "object" ? JSON.stringify(value) : String(value);
            return [name, text];
        });
        item.querySelector("[data-settings]").replaceChildren(...rows);
        const error = item.querySelector("[data-error]");
        error.hidden = !entry.error;
        error.textContent = entry.error || "";
        for (const button of item.querySelectorAll("[data-action]")) {
            const action = button.dataset.action;
            button.hidden = !(QUEUE_ACTIONS[entry.state] || []).includes(action) || (action === "up" && index === 0);
            Atelier.onClick(button, async () => {
                await Atelier.ask("POST", "queue/" + encodeURIComponent(entry.id), { action });
                await poll();
            }, error);
        }
        return item;
    }

    // ------------------------------------------------------------ buttons

    async function send(path) {
        const problems = Atelier.$("problems");
        try {
            const answer = await Atelier.ask("POST", path, { settings: Atelier.form.settings() });
            Atelier.form.show([], answer.warnings, false);
            Atelier.say(Atelier.$("writes"), answer.position > 0 ? "In the queue at place {n}" : "", { n: answer.position });
        } catch (error) {
            const told = error.problems && error.problems.length;
            Atelier.form.show(told ? error.problems : [{ field: "", message: error.message }], error.warnings, true);
            if (told) Atelier.form.toFirstError();
            else problems.scrollIntoView({ block: "nearest" });
        }
        await poll();
    }

    live.begin = async () => {
        if (window.Notification && Notification.permission === "default") Notification.requestPermission();
        await send("start");
    };

    function promptBox() {
        return document.querySelector("#txt2img_prompt textarea");
    }

    function useInPrompt() {
        const box = promptBox();
        const name = (live.status.finished["file name"] || "").replace(/\.safetensors$/, "");
        const tag = `<lora:${name}:1>`;
        if (!box.value.includes(tag)) box.value = `${box.value}${box.value && !/\s$/.test(box.value) ? " " : ""}${tag}`;
        box.dispatchEvent(new Event("input", { bubbles: true }));
        Atelier.say(Atelier.$("result_text"), "Put into the txt2img prompt: {tag}", { tag });
    }

    live.start = () => {
        const { $, onClick } = Atelier;
        onClick($("start"), live.begin);
        onClick($("queue_add"), () => send("queue"));
        const stop = (save) => async () => {
            await Atelier.ask("POST", "stop", { save });
            await poll();
        };
        onClick($("stop"), stop(false), $("live_stage"));
        onClick($("stop_save"), stop(true), $("live_stage"));
        onClick($("use_in_prompt"), useInPrompt, $("result_text"));
        tick();
    };

    document.addEventListener("atelier:language", () => {
        queueShown = "";
        if (live.status) showQueue(live.status.queue || []);
    });
    document.addEventListener("visibilitychange", () => {
        if (document.visibilityState === "visible" && title !== null && document.title.match(/^[✓✗]/)) {
            document.title = title;
            title = null;
        }
        tick();
    });
    setInterval(tick, 250);
})();
