/* The list of jobs: what runs, what waits in its order, what is over, and what can be done with each. */
(function () {
    "use strict";

    const Atelier = (window.Atelier = window.Atelier || {});
    const queue = (Atelier.queue = {});
    let revision = -1;

    const WORDS = {
        waiting: "", running: "running", stopped: "stopped", failed: "failed", interrupted: "interrupted",
        saved_early: "stopped and written", done: "written",
    };
    const ENDED_SHOWN = 5;

    async function refresh() {
        show(await Atelier.ask("GET", "queue"));
    }

    /** Show the queue as it is now when it is not the one of this revision. */
    queue.follow = async (now) => {
        if (now !== revision) await refresh();
    };

    function show(found) {
        revision = found.revision;
        const list = Atelier.$("queue");
        const open = new Set([...list.querySelectorAll("details[open]")].map((box) => box.closest("li").dataset.id));
        const entries = [found.running, ...found.waiting, ...found.ended.slice(0, ENDED_SHOWN)].filter(Boolean);
        list.replaceChildren(...entries.map((entry) => entryOf(entry, found.waiting.length, open.has(entry.id))));
        Atelier.$("queue_empty").hidden = entries.length > 0;
        Atelier.$("queue_clear").hidden = !found.ended.some((entry) => !entry.resumable);
        Atelier.$("queue_go").hidden = found.going || !found.waiting.length;
    }

    function actionsOf(entry, waiting) {
        if (entry.state === "waiting") {
            const place = entry.position;
            return { now: true, up: place > 1, down: place < waiting, delete: true };
        }
        return entry.state === "running" ? {} : { resume: entry.resumable, extend: entry.extendable, delete: true };
    }

    async function act(entry, action) {
        const body = { id: entry.id };
        if (action === "extend") return showLength(entry);
        const moves = { up: entry.position - 2, down: entry.position };
        if (action in moves) await Atelier.ask("POST", "queue/move", { ...body, to: moves[action] });
        else await Atelier.ask("POST", { now: "queue/run", resume: "queue/resume", delete: "queue/delete" }[action], body);
        await refresh();
        await Atelier.live.poll();
    }

    /** Ask how long a run that is over shall be in all, in what it was measured in. */
    function showLength(entry) {
        const item = Atelier.$("queue").querySelector(`[data-id="${entry.id}"]`);
        const form = item.querySelector("[data-extend]");
        const epochs = entry.settings.find(([name]) => name === "train epochs");
        const input = form.querySelector("[data-length]");
        form.hidden = !form.hidden;
        Atelier.say(form.querySelector("[data-unit]"), epochs ? "Epochs in all" : "Steps in all");
        input.value = epochs ? 2 * Number(epochs[1]) : 2 * entry.total || "";
        if (!form.hidden) input.select();
        form.onsubmit = async (event) => {
            event.preventDefault();
            const error = item.querySelector("[data-error]");
            try {
                const settings = { [epochs ? "train_epochs" : "train_iterations"]: input.value };
                show(await Atelier.ask("POST", "queue/extend", { id: entry.id, settings }));
                await Atelier.live.poll();
            } catch (fault) {
                error.hidden = false;
                error.textContent = fault.message;
            }
        };
    }

    function entryOf(entry, waiting, open) {
        const item = Atelier.copyOf("queue");
        item.dataset.id = entry.id;
        item.dataset.state = entry.state;
        item.querySelector("details").open = open;
        item.querySelector("[data-name]").textContent = entry.name;
        const about = [entry.mode, entry.model, Atelier.t(WORDS[entry.state] || "")].filter(Boolean);
        item.querySelector("[data-about]").textContent = about.join(" · ");
        const rows = entry.settings.flatMap(([name, value]) => {
            const pair = [document.createElement("dt"), document.createElement("dd")];
            [pair[0].textContent, pair[1].textContent] = [name, value];
            return pair;
        });
        item.querySelector("[data-settings]").replaceChildren(...rows);
        const error = item.querySelector("[data-error]");
        error.hidden = !entry.error;
        error.textContent = entry.error || "";
        const actions = actionsOf(entry, waiting);
        for (const button of item.querySelectorAll("[data-action]")) {
            button.hidden = !actions[button.dataset.action];
            Atelier.onClick(button, () => act(entry, button.dataset.action), Atelier.$("live_stage"));
        }
        return item;
    }

    queue.start = () => {
        const { $, onClick, ask } = Atelier;
        onClick($("queue_go"), async () => show(await ask("POST", "queue/go")), $("live_stage"));
        onClick($("queue_clear"), async () => show(await ask("POST", "queue/clear")), $("live_stage"));
    };

    document.addEventListener("atelier:language", () => (revision = -1));
})();
