/* The form: values, what the mode shows, what differs from its default, errors at their fields. */
(function () {
    "use strict";

    const Atelier = (window.Atelier = window.Atelier || {});
    const SECOND = "2nd pass";
    const CHECK_AFTER = 300;
    const CHECK_APART = 1000;
    const EDGE = 8;
    const OTHER = "\u0000other";

    const form = (Atelier.form = { fields: [], problems: [], extras: {}, shipped: true });
    let info = null;
    let lists = {};
    let timer = 0;
    let checked = 0;
    let asked = 0;
    let onDisk = { key: "", problems: [] };

    // ------------------------------------------------------------ fields and values

    function fieldOf(element) {
        const id = "atelier_" + ("second" in element.dataset ? "second_" : "") + element.dataset.attribute;
        const note = document.getElementById(id + "_note");
        return {
            element,
            id,
            note,
            notes: note && note.dataset.notes ? JSON.parse(note.dataset.notes) : null,
            input: document.getElementById(id),
            error: document.getElementById(id + "_error"),
            key: element.dataset.field,
            attribute: element.dataset.attribute,
            kind: element.dataset.attribute === "mode" ? "mode" : element.dataset.kind,
            needs: element.dataset.needs || "",
            second: "second" in element.dataset,
            standard: element.dataset.default,
            holds: element.dataset.holds || "",
            touched: false,
            shown: true,
        };
    }

    function boxes(field) {
        return [...field.input.querySelectorAll("input")];
    }

    const read = (form.read = (field) => {
        if (field.kind === "check") return field.input.checked;
        if (field.kind === "mode") return (boxes(field).find((box) => box.checked) || {}).value || "";
        if (field.kind === "checks") return boxes(field).filter((box) => box.checked).map((box) => box.value);
        return field.input.value;
    });

    const write = (form.write = (field, value) => {
        if (value === null || value === undefined) value = field.standard;
        if (field.kind === "check") field.input.checked = value === true || value === "true";
        else if (field.kind === "mode") boxes(field).forEach((box) => (box.checked = box.value === value));
        else if (field.kind === "checks") {
            const names = new Set(Array.isArray(value) ? value : String(value).split(","));
            boxes(field).forEach((box) => (box.checked = names.has(box.value)));
        } else {
            const text = Array.isArray(value) ? value.join(",") : String(value);
            if (field.kind === "choice" && ![...field.input.options].some((option) => option.value === text)) {
                field.input.add(new Option(text, text));
            }
            field.input.value = text;
            syncList(field);
        }
    });

    function asText(value) {
        return Array.isArray(value) ? value.join(",") : String(value);
    }

    function differs(field) {
        const [now, standard] = [asText(read(field)).trim(), field.standard];
        if (now === standard || (now === "" && field.kind === "number")) return false;
        const both = now !== "" && standard !== "" && field.kind === "number";
        return !(both && Number(now) === Number(standard));
    }

    form.find = (key, second) => form.fields.find((one) => one.key === key && one.second === Boolean(second));

    form.value = (key) => {
        const field = form.find(key, false);
        return field ? read(field) : "";
    };

    form.set = (key, value) => {
        const field = form.find(key, false);
        if (!field) return;
        write(field, value);
        form.changed(field);
    };

    /** The settings as the routes take them: what is shown, and what came with a file and has no field. */
    form.settings = () => {
        const settings = { format: 1, ...form.extras };
        const second = {};
        for (const field of form.fields) if (field.shown) (field.second ? second : settings)[field.key] = read(field);
        if (Object.keys(second).length) settings[SECOND] = second;
        return settings;
    };

    /** Put settings into the form; fields that are not named get their default. `shipped`: nobody chose these values. */
    form.fill = (settings, second, extras, shipped) => {
        for (const field of form.fields) {
            const from = field.second ? second || {} : settings;
            write(field, field.key in from ? from[field.key] : field.standard);
            field.touched = false;
        }
        form.extras = extras || {};
        form.shipped = Boolean(shipped);
        form.arrange();
        form.checkSoon(0);
        document.dispatchEvent(new CustomEvent("atelier:filled"));
    };

    // ------------------------------------------------------------ what is seen

    /** The tags of a pass, or null when the mode has no such pass. */
    function tagsOf(second) {
        const passes = info[form.value("mode")];
        const mine = passes && passes[second ? "second" : "first"];
        const kind = form.find("network_type", second) || form.find("network_type", false);
        return mine ? new Set(mine[read(kind)] || []) : null;
    }

    /** Show what the mode and the adapter type use. */
    form.arrange = () => {
        const tags = [tagsOf(false), tagsOf(true)];
        const hasSecond = tags[1] !== null;
        const useSecond = hasSecond && form.value("use_2nd_pass_settings") === true;
        for (const field of form.fields) {
            const mine = tags[field.second ? 1 : 0];
            const isSwitch = field.key === "use_2nd_pass_settings";
            const fits = mine !== null && (!field.needs || mine.has(field.needs));
            field.shown = isSwitch ? hasSecond : fits && (!field.second || useSecond);
            field.element.hidden = !field.shown || field.filtered === true;
        }
        Atelier.$("second").hidden = !useSecond;
        for (const box of document.querySelectorAll("#atelier_form details, #atelier_form > section")) {
            box.hidden = ![...box.querySelectorAll("[data-field]")].some((one) => !one.hidden);
        }
        Atelier.say(Atelier.$("mode_note"), (info[form.value("mode")] || { help: "" }).help);
        for (const row of document.querySelectorAll("#atelier_form [data-prompts]")) {
            row.hidden = !(tags[0] && tags[0].has("prompts"));
        }
        markAll();
    };

    function mark(field) {
        if (field.notes) Atelier.say(field.note, field.notes[read(field)] || "");
        field.element.classList.toggle("atelier-changed", differs(field));
    }

    function markAll() {
        form.fields.forEach(mark);
        for (const box of document.querySelectorAll("#atelier_form details")) {
            const inside = form.fields.filter((field) => field.shown && box.contains(field.element));
            const count = box.querySelector("summary [data-count]");
            const only = inside.length === 1 && inside[0].kind === "checks" ? inside[0] : null;
            const wrong = inside.filter((field) => !field.error.hidden).length;
            const changed = inside.filter(differs).length;
            count.toggleAttribute("data-changed", !only);
            count.title = only ? "" : Atelier.t("Settings here that are not the default");
            count.textContent = only ? `${read(only).length} / ${boxes(only).length}` : changed || "";
            count.classList.toggle("atelier-wrong", wrong > 0);
        }
        const text = Object.keys(form.extras.traintrain || {}).join(", ");
        const note = Atelier.$("extra");
        note.hidden = !("traintrain" in form.extras);
        if (!note.hidden && text) {
            Atelier.say(note, "From TrainTrain; kept, without effect here: {names}", { names: text });
        } else Atelier.say(note, "From TrainTrain.");
    }

    /** Show only fields whose name or help holds the words; folds open. */
    function search(text) {
        const wanted = text.trim().toLowerCase().split(/\s+/).filter(Boolean);
        for (const field of form.fields) {
            const label = field.element.querySelector(".atelier-label");
            const own = [field.key.replaceAll("_", " "), field.key, label ? label.textContent : ""];
            const held = own.join(" ").toLowerCase();
            field.filtered = !wanted.every((word) => held.includes(word));
        }
        const box = Atelier.$("form");
        box.classList.toggle("atelier-searching", wanted.length > 0);
        for (const fold of box.querySelectorAll("details")) {
            if (wanted.length && !("was" in fold.dataset)) fold.dataset.was = fold.open ? "open" : "";
            if (wanted.length) fold.open = true;
            else if ("was" in fold.dataset) {
                fold.open = fold.dataset.was === "open";
                delete fold.dataset.was;
            }
        }
        form.arrange();
    }

    /** Move the help of a field to the left as far as it would leave the window. */
    function keepInside(event) {
        const name = event.target.closest(".atelier-name");
        const help = name && name.parentElement.querySelector(".atelier-help");
        if (!help) return;
        help.style.translate = "";
        const over = help.getBoundingClientRect().right + EDGE - document.documentElement.clientWidth;
        if (over > 0) help.style.translate = -over + "px";
    }

    // ------------------------------------------------------------ lists of files

    const EMPTY = {
        model: () => (lists.loaded ? ["Loaded now: {name}", { name: lists.loaded }] : ["None is loaded: choose one"]),
        vae: () => [lists.prompt_box ? "The one in use" : "The model's own"],
        te: () => ["The model's own"],
        lora: () => ["None"],
    };
    const LISTS = { model: "checkpoints", vae: "vaes", te: "text_encoders", lora: "loras" };

    function syncList(field) {
        const list = document.getElementById(field.id + "_list");
        if (!list) return;
        const known = [...list.options].some((option) => option.value === field.input.value);
        list.value = known ? field.input.value : OTHER;
        field.input.parentElement.hidden = known;
    }

    function fillList(list) {
        const kind = list.dataset.list;
        const names = lists[LISTS[kind]] || [];
        const kept = list.value;
        const [text, values] = EMPTY[kind]();
        const options = [new Option(Atelier.t(text, values), ""), ...names.map((name) => new Option(name, name))];
        const field = form.fields.find((one) => one.id + "_list" === list.id);
        if (field) options.push(new Option(Atelier.t("Other file …"), OTHER));
        list.replaceChildren(...options);
        if (field) syncList(field);
        else if (names.includes(kept)) list.value = kept;
    }

    form.refreshLists = async (again) => {
        lists = await Atelier.ask(again ? "POST" : "GET", again ? "models/refresh" : "models");
        form.promptBox = lists.prompt_box;
        form.fillLists();
        return lists;
    };

    form.fillLists = () => Atelier.root().querySelectorAll("select[data-list]").forEach(fillList);

    // ------------------------------------------------------------ checking

    /** Have the settings checked after a moment, at most once a second. */
    form.checkSoon = (wait) => {
        clearTimeout(timer);
        const next = Math.max(wait === undefined ? CHECK_AFTER : wait, checked + CHECK_APART - Date.now());
        timer = setTimeout(check, next);
    };

    /** No check that is on its way may change what is shown from now on: a refusal of Start stays until an edit. */
    form.dropChecks = () => {
        clearTimeout(timer);
        asked++;
        onDisk.key = "";
        keepDraft();
    };

    /** The same settings may have other problems now: files came or went. */
    form.checkAnew = () => {
        onDisk.key = "";
        form.checkSoon();
    };

    function keepDraft() {
        Atelier.remember("draft", { settings: form.settings(), all: everything() }, true);
    }

    /** What the files of this machine are looked at for; they are not looked at again while it stays as it is. */
    function diskKey() {
        const named = (one) => one.holds || /^(mode|save_|image|sub_image|data|diff_target|network_type|train_.*precision)/.test(one.key);
        return JSON.stringify(form.fields.filter((one) => one.shown && named(one)).map(read));
    }

    async function check() {
        checked = Date.now();
        const mine = ++asked;
        keepDraft();
        const key = diskKey();
        const files = key !== onDisk.key;
        try {
            const answer = await Atelier.ask("POST", "validate", { settings: form.settings(), files });
            if (mine !== asked) return;
            if (files) onDisk = { key, problems: answer.problems.filter((one) => one.of_files) };
            else answer.problems.push(...onDisk.problems);
            form.show(answer.problems, answer.warnings, false);
            document.dispatchEvent(new CustomEvent("atelier:checked"));
            await Atelier.ahead.look(answer, () => mine === asked);
        } catch (error) {
            if (mine === asked) Atelier.say(Atelier.$("writes"), error.message);
        }
    }

    function everything() {
        const touched = form.fields.filter((field) => field.touched).map((field) => field.id);
        const values = { first: {}, second: {}, extras: form.extras, shipped: form.shipped, touched };
        for (const field of form.fields) values[field.second ? "second" : "first"][field.key] = read(field);
        return values;
    }

    /** Every problem at its field, those without a field in the list. `all`: also at fields nobody has touched. */
    form.show = (problems, warnings, all) => {
        form.problems = problems || [];
        const rest = [];
        const texts = new Map();
        for (const problem of form.problems) {
            const field = form.fields.find(
                (one) => one.shown && one.second === Boolean(problem.second) && one.attribute === problem.attribute,
            );
            if (!field) rest.push(problem);
            else texts.set(field, [...(texts.get(field) || []), problem.message]);
        }
        for (const field of form.fields) showError(field, texts.get(field), all);
        listOf(Atelier.$("problems"), rest.map((one) => (one.field ? `${one.field}: ${one.message}` : one.message)));
        listOf(Atelier.$("warnings"), warnings || []);
        const badge = Atelier.$("start_count");
        badge.hidden = !form.problems.length;
        Atelier.say(badge, "{n}", { n: form.problems.length });
        badge.title = Atelier.t("Settings to fix before the start");
        markAll();
    };

    function showError(field, texts, all) {
        const empty = asText(read(field)).trim() === "";
        const wanted = texts && (all || field.touched || !empty);
        field.error.hidden = !wanted;
        field.error.textContent = wanted ? texts.join(" ") : "";
        field.element.classList.toggle("atelier-invalid", Boolean(wanted));
        if (field.input.setAttribute) field.input.setAttribute("aria-invalid", String(Boolean(wanted)));
    }

    function listOf(element, lines) {
        element.replaceChildren(
            ...lines.map((line) => {
                const item = document.createElement("li");
                item.textContent = line;
                return item;
            }),
        );
        element.hidden = !lines.length;
    }

    /** Go to the first field that has an error. */
    form.toFirstError = () => {
        const field = form.fields.find((one) => one.shown && !one.error.hidden);
        if (!field) return;
        for (let box = field.element.closest("details"); box; box = box.parentElement.closest("details")) box.open = true;
        const target = field.kind === "mode" || field.kind === "checks" ? boxes(field)[0] : field.input;
        target.focus({ preventScroll: true });
        field.element.scrollIntoView({ block: "center", behavior: "smooth" });
    };

    // ------------------------------------------------------------ events

    /** Something in a field changed: `field`, or anything when it is left out. */
    form.changed = (field) => {
        if (field) field.touched = true;
        const arranges = !field || ["mode", "network_type", "use_2nd_pass_settings"].includes(field.key);
        if (arranges) form.arrange();
        else {
            mark(field);
            markAll();
        }
        form.checkSoon();
    };

    function byElement(target) {
        const element = target.closest("[data-field]");
        return element && form.fields.find((field) => field.element === element);
    }

    function onInput(event) {
        const field = byElement(event.target);
        if (!field) return;
        if (event.target.matches("select[data-list]")) {
            const other = event.target.value === OTHER;
            field.input.parentElement.hidden = !other;
            field.input.value = other ? "" : event.target.value;
            if (other) field.input.focus();
        }
        form.changed(field);
    }

    function onPress(event) {
        const button = event.target.closest("button");
        const field = button && byElement(button);
        if (!field) return;
        if ("reset" in button.dataset) {
            write(field, field.standard);
            form.changed(field);
        } else if ("pick" in button.dataset) {
            pickFamily(boxes(field), button.dataset.pick);
            form.changed(field);
        }
    }

    /** "*" chooses all, "" none, letters a family (or none of it, when all of it was chosen). */
    function pickFamily(all, pick) {
        const named = pick !== "*" && pick !== "";
        const inside = named ? all.filter((box) => box.value.replace(/\d+$/, "") === pick) : all;
        const on = named ? !inside.every((box) => box.checked) : pick === "*";
        inside.forEach((box) => (box.checked = on));
    }

    function copyFirst() {
        for (const field of form.fields.filter((one) => one.second)) {
            const first = form.find(field.key, false);
            if (first) write(field, read(first));
        }
        form.arrange();
        form.checkSoon();
    }

    form.start = () => {
        info = JSON.parse(Atelier.root().dataset.info);
        form.fields = [...document.querySelectorAll("#atelier_form [data-field]")].map(fieldOf);
        const box = Atelier.$("form");
        box.addEventListener("submit", (event) => event.preventDefault());
        box.addEventListener("input", onInput);
        box.addEventListener("click", onPress);
        box.addEventListener("pointerover", keepInside);
        Atelier.$("search").addEventListener("input", (event) => search(event.target.value));
        Atelier.$("copy_first").addEventListener("click", copyFirst);
        Atelier.onClick(Atelier.$("lists_refresh"), () => form.refreshLists(true), Atelier.$("writes"));
        form.arrange();
        const draft = Atelier.recall("draft", true);
        if (draft && draft.all) {
            form.fill(draft.all.first, draft.all.second, draft.all.extras, draft.all.shipped);
            for (const field of form.fields) field.touched = (draft.all.touched || []).includes(field.id);
        }
        return Boolean(draft);
    };

    document.addEventListener("atelier:language", () => form.fillLists());
})();
