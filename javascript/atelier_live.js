/* The run as it goes: one poll a second while it runs, one in three seconds else, none while nobody looks. */
(function () {
    "use strict";

    const Atelier = (window.Atelier = window.Atelier || {});
    const EACH = 1000;
    const EACH_IDLE = 3000;
    const EACH_LOST = 6000; // a WebUI that is just starting is better left alone
    const HELD_AGAIN = 1000;
    const LOST_AGAIN = 30000; // doubled each time
    const LINES = 300;
    const EDGE = 8; // pixels between the side column and the window
    const MARKED = /^[✓✗]/;
    const [WIDE, HIGH] = [300, 90];
    const STATES = {
        idle: "Idle", preparing: "Preparing", running: "Training", stopping: "Stopping", done: "Finished",
        saved_early: "Stopped", stopped: "Stopped", failed: "Failed", interrupted: "Interrupted",
    };

    const live = (Atelier.live = { status: null });
    let run = "";
    let points = [];
    let revision = -1;
    let line = 0;
    let polling = false;
    let last = 0;
    let lost = false;
    let waits = "";
    let told = null;
    let title = null;

    // ------------------------------------------------------------ asking

    async function poll() {
        if (polling) return;
        polling = true;
        last = Date.now();
        try {
            const query = `revision=${revision}&points=${points.length}&after=${line}`;
            const status = await Atelier.ask("GET", "status?" + query);
            lost = false;
            show(status);
            await Atelier.queue.follow(status.queue.revision);
        } catch (error) {
            lost = error.status === 0 || error.status === 404;
            Atelier.say(Atelier.$("live_state"), error.message);
        } finally {
            polling = false;
        }
    }

    function busy() {
        return live.status !== null && live.status.state !== "idle";
    }

    function tick() {
        const each = lost ? EACH_LOST : busy() ? EACH : EACH_IDLE;
        const seen = Atelier.isSeen();
        settleTitle(seen);
        if (seen && Date.now() - last >= each - 50) poll();
    }

    /** A run; one that was resumed is another one of the same id. */
    function markOf(one) {
        return `${one.id} ${one.started}`;
    }

    /**
     * One request that is answered when a run is over, so that nobody has to ask while the tab is hidden, and then one
     * for the run that follows. Routes hold it for some minutes, and proxies may cut it: then it is sent again.
     */
    async function waitFor(one) {
        const mark = markOf(one);
        if (waits === mark || told === mark) return;
        waits = mark;
        let lost = LOST_AGAIN;
        while (waits === mark) {
            let pause = HELD_AGAIN;
            try {
                const answer = await Atelier.ask("GET", "finished?id=" + encodeURIComponent(one.id));
                if (answer.ended) {
                    if (answer.id) announce(answer);
                    return answer.next && waitFor(answer.next);
                }
            } catch {
                [pause, lost] = [lost, lost * 2];
            }
            await new Promise((resolve) => setTimeout(resolve, pause));
        }
    }

    // ------------------------------------------------------------ showing

    function show(status) {
        live.status = status;
        const now = status.run || {};
        run = now.id || "";
        showState(status, now);
        showFacts(status, now);
        showPoints(status.curve);
        showLog(status.log);
        showSamples(now);
        showResult(now);
        Atelier.ahead.showReport(now.report || []);
        showTitle(now);
        showBanner(status);
        if (busy() && run) waitFor(now);
        document.dispatchEvent(new CustomEvent("atelier:status", { detail: status }));
    }

    /** What the run does at the moment, as a key of STATES. */
    function stateOf(status, now) {
        if (status.state === "idle") return now.id ? now.state : "idle";
        const trains = now.step || ((now.report || []).length && !now.stage); // the report comes right before the first step
        return status.state === "running" && !trains ? "preparing" : status.state;
    }

    function showState(status, now) {
        const state = Atelier.$("live_state");
        const what = stateOf(status, now);
        Atelier.say(state, STATES[what] || what);
        state.dataset.state = what;
        Atelier.say(Atelier.$("live_job"), now.name ? "{name}" : "", { name: [now.name, now.mode].join(" · ") });
        for (const name of ["stop", "stop_save"]) Atelier.$(name).disabled = status.state !== "running";
        const stage = now.stage;
        const words = stage ? ["{name}: {done} / {total}", { ...stage, name: Atelier.t(stage.name) }] : [""];
        Atelier.say(Atelier.$("live_stage"), ...words);
        const bar = Atelier.$("progress");
        const share = stage ? stage.done / Math.max(stage.total, 1) : now.progress || 0;
        if (busy() && !stage && !now.step) bar.removeAttribute("value");
        else bar.value = Math.round(share * 1000);
    }

    function showFacts(status, now) {
        const { number, duration, gigabytes } = Atelier;
        const put = (name, text) => {
            const element = Atelier.$("live_" + name);
            if (element.textContent !== text) element.textContent = text;
        };
        put("step", now.total ? `${now.step} / ${now.total}` : "–");
        put("loss", number(now.loss_ema));
        put("rate", (now.rates || []).length ? [...new Set(now.rates.map(number))].join(" · ") : "–");
        const each = now.seconds_per_step;
        put("speed", each ? (each < 1 ? `${number(Math.round(each * 1000))} ms` : `${number(each)} s`) : "–");
        put("left", busy() ? duration(now.seconds_left) : "–");
        const memory = status.memory || {};
        const whole = memory.total_mb ? ` / ${gigabytes(memory.total_mb)}` : "";
        put("memory", memory.used_mb ? `${gigabytes(memory.used_mb)}${whole} GB` : "–");
        Atelier.$("live_memory").title = memory.device || "";
    }

    function showPoints(curve) {
        const same = curve.revision === revision;
        if (same && !curve.points.length) return;
        points = [...(same ? points.slice(0, curve.from) : []), ...curve.points];
        revision = curve.revision;
        showCurve();
    }

    /** What concerns the whole tab: jobs that broke off with their process, and files of the queue that are wrong. */
    function showBanner(status) {
        const names = status.queue.interrupted.map((entry) => entry.name).join(", ");
        const texts = names ? [Atelier.t("Interrupted, can be resumed: {names}. See the queue.", { names })] : [];
        if (busy() && promptBox()) texts.push(Atelier.t("Images of the WebUI wait until this run is over."));
        texts.push(...status.problems);
        const banner = Atelier.$("banner");
        banner.hidden = !texts.length;
        Atelier.say(banner, texts.join(" "));
    }

    /** The losses as two paths: at most one point per unit of width, scaled to what most of them are. */
    function showCurve() {
        const box = Atelier.$("curve");
        box.classList.toggle("atelier-empty", points.length < 2);
        const stride = Math.ceil(points.length / WIDE) || 1;
        const shown = points.filter((point, index) => index % stride === 0 || index === points.length - 1);
        const sorted = shown.map((point) => point[1]).filter(Number.isFinite).sort((a, b) => a - b);
        if (!sorted.length) return;
        const at = (share) => sorted[Math.min(Math.floor(share * sorted.length), sorted.length - 1)];
        const smooth = shown.map((point) => point[2]).filter(Number.isFinite);
        let [low, high] = [Math.min(at(0.02), ...smooth), Math.max(at(0.98), ...smooth)];
        if (high - low < 1e-12) [low, high] = [low - 0.5, high + 0.5];
        const [first, end] = [shown[0][0], shown[shown.length - 1][0]];
        const x = (step) => ((step - first) / Math.max(end - first, 1)) * WIDE;
        const y = (value) => HIGH - 3 - (Math.min(Math.max((value - low) / (high - low), 0), 1) * (HIGH - 6));
        const path = (column) => shown
            .filter((point) => Number.isFinite(point[column]))
            .map((point, index) => `${index ? "L" : "M"}${x(point[0]).toFixed(1)} ${y(point[column]).toFixed(1)}`)
            .join("");
        box.querySelector(".atelier-line-raw").setAttribute("d", path(1));
        box.querySelector(".atelier-line-ema").setAttribute("d", path(2));
        Atelier.$("curve_high").textContent = Atelier.number(high);
        Atelier.$("curve_low").textContent = Atelier.number(low);
    }

    function showLog(lines) {
        if (!lines.length) return;
        line = lines[lines.length - 1].seq;
        const list = Atelier.$("log");
        const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 30;
        const add = (text, level, at) => {
            const item = document.createElement("li");
            item.textContent = text;
            item.dataset.level = level;
            item.title = new Date(at * 1000).toLocaleTimeString();
            list.append(item);
        };
        for (const one of lines) {
            if (one.run && one.run !== list.dataset.run) add(one.name, "run", one.at);
            list.dataset.run = one.run;
            add(one.text, one.level, one.at);
        }
        while (list.children.length > LINES) list.firstChild.remove();
        if (atEnd) list.scrollTop = list.scrollHeight;
    }

    function showSamples(now) {
        const box = Atelier.$("samples");
        const files = now.samples || [];
        box.hidden = !files.length;
        const key = files.join("\n");
        if (box.dataset.shown === key) return;
        box.dataset.shown = key;
        box.replaceChildren(...files.map((file) => {
            const link = document.createElement("a");
            link.href = file.replace(/^\//, "");
            link.target = "_blank";
            const picture = document.createElement("img");
            picture.src = link.href;
            picture.alt = Atelier.t("Sample of step {n}", { n: now.sampled_at });
            link.append(picture);
            return link;
        }));
    }

    const ENDINGS = {
        done: "Written: {file}", saved_early: "Stopped and written: {file}", stopped: "Stopped, nothing written.",
        failed: "{error}", interrupted: "Interrupted; it can be resumed from the queue.",
    };

    function showResult(now) {
        const box = Atelier.$("result");
        box.hidden = !now.ended;
        if (!now.ended) return;
        box.dataset.reason = now.state;
        if (box.dataset.shown === now.id + now.finished) return;
        box.dataset.shown = now.id + now.finished;
        Atelier.say(Atelier.$("result_text"), ENDINGS[now.state] || now.state, { file: now.lora, error: now.error });
        for (const name of ["open_loras", "compare_now"]) Atelier.$(name).hidden = !now.lora;
        Atelier.$("use_in_prompt").hidden = !now.lora || !promptBox();
        Atelier.form.refreshLists(false).catch(() => null);
        Atelier.form.checkAnew(); // what the next one will take is known now, and that this one's file is there
        announce(now);
    }

    // ------------------------------------------------------------ title and notification

    function showTitle(now) {
        if (busy() && now.step && told !== markOf(now)) {
            if (title === null) title = document.title;
            document.title = `[${Math.floor(100 * now.progress)}%] ${title}`;
        } else if (title !== null && !busy() && !MARKED.test(document.title)) {
            document.title = title;
            title = null;
        }
    }

    /** The mark of an end goes when somebody looks; a percentage that nobody asks for any more does not stay. */
    function settleTitle(seen) {
        if (title === null || seen !== MARKED.test(document.title)) return;
        const wanted = seen ? title : `[…] ${title}`;
        if (document.title !== wanted) document.title = wanted;
        if (seen) title = null;
    }

    /** Say once that a run is over: a mark in the title until somebody looks, a notification where that is allowed. */
    function announce(now) {
        if (told === markOf(now)) return;
        const news = told !== null || busy() || !Atelier.isSeen();
        told = markOf(now);
        if (!news || Atelier.isSeen()) return;
        const failed = now.state === "failed";
        title = title === null ? document.title : title;
        document.title = `${failed ? "✗" : "✓"} ${title}`;
        if (window.Notification && Notification.permission === "granted") {
            const words = Atelier.t(failed ? "Training failed" : "Training finished");
            new Notification(words, { body: now.lora || now.error || now.name || "", tag: "atelier" });
        }
    }

    // ------------------------------------------------------------ buttons

    async function send(path) {
        Atelier.form.dropChecks();
        try {
            const answer = await Atelier.ask("POST", path, { settings: Atelier.form.settings() });
            Atelier.form.show([], answer.warnings, false);
            const words = answer.position > 0 ? "Waits in the queue as number {n}: {name}" : "Started: {name}";
            const name = Atelier.form.value("save_lora_name").trim() || "untitled";
            Atelier.say(Atelier.$("writes"), words, { n: answer.position, name });
        } catch (error) {
            const told = error.problems && error.problems.length;
            Atelier.form.show(told ? error.problems : [{ field: "", message: error.message }], [], true);
            if (told) Atelier.form.toFirstError();
        }
        await poll();
    }

    live.poll = poll;

    live.begin = async () => {
        if (window.Notification && Notification.permission === "default") Notification.requestPermission();
        await send("start");
    };

    function promptBox() {
        return Atelier.form.promptBox ? document.querySelector(Atelier.form.promptBox) : null;
    }

    function useInPrompt() {
        const box = promptBox();
        const tag = `<lora:${live.status.run.lora.replace(/\.safetensors$/, "")}:1>`;
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
        new ResizeObserver(fitSide).observe(document.querySelector("#atelier_root .atelier-side"));
        window.addEventListener("resize", fitSide);
        tick();
    };

    /** A column that is higher than the window scrolls with the page, and only then stays: with its end in view. */
    function fitSide() {
        const side = document.querySelector("#atelier_root .atelier-side");
        const top = Math.min(EDGE, window.innerHeight - side.offsetHeight - EDGE);
        side.style.setProperty("--atelier-side-top", `${top}px`);
    }

    document.addEventListener("visibilitychange", tick);
    setInterval(tick, 250);
})();
