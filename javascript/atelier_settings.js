/* Presets, settings files, and what is dropped on the tab: a JSON, or a LoRA whose metadata holds its job. */
(function () {
    "use strict";

    const Atelier = (window.Atelier = window.Atelier || {});
    const LARGEST_HEADER = 64 * 1024 * 1024;
    const LARGEST_JSON = 16 * 1024 * 1024;
    const settings = (Atelier.settings = {});
    let own = [];

    function tell(text, values) {
        Atelier.say(Atelier.$("drop"), text, values);
        Atelier.$("drop").title = Atelier.$("drop").textContent; // it has room for two lines
    }

    /** What the line says while nothing has been read. */
    settings.invite = () => tell("Drop a settings JSON or a LoRA, or click");

    /** Fill the form from a route's answer; `shipped` values are nobody's own. */
    function use(answer, name, shipped) {
        const { "2nd pass": second, traintrain, ...first } = answer.settings;
        Atelier.form.fill(first, second, traintrain === undefined ? {} : { traintrain }, shipped);
        if (name && answer.note) tell("Filled from {name}: {note}", { name, note: Atelier.t(answer.note) });
        else if (name) tell("Filled from {name}", { name });
        Atelier.form.show([], answer.warnings, false);
    }

    function refuse(error) {
        if (error.problems && error.problems.length) Atelier.form.show(error.problems, error.warnings, true);
        tell(error.problems && error.problems.length ? "These settings cannot be used" : error.message);
    }

    // ------------------------------------------------------------ presets

    settings.refreshPresets = async (chosen) => {
        const found = await Atelier.ask("GET", "presets");
        own = found.own;
        const list = Atelier.$("preset");
        const kept = chosen || list.value;
        const names = (title, all) => {
            const group = document.createElement("optgroup");
            group.label = Atelier.t(title);
            group.append(...all.map((name) => new Option(name, name)));
            return all.length ? [group] : [];
        };
        list.replaceChildren(new Option(Atelier.t("Choose a preset"), ""), ...names("Shipped", found.shipped), ...names("Yours", found.own));
        list.value = [...found.shipped, ...found.own].includes(kept) ? kept : "";
        markOwn();
    };

    function markOwn() {
        Atelier.$("preset_delete").disabled = !own.includes(Atelier.$("preset").value);
    }

    settings.loadPreset = async (name) => {
        markOwn();
        if (!name) return;
        try {
            use(await Atelier.ask("GET", "presets/" + encodeURIComponent(name)), name, !own.includes(name));
        } catch (error) {
            refuse(error);
        }
    };

    async function savePreset(event) {
        event.preventDefault();
        const name = Atelier.$("preset_name").value.trim();
        try {
            await Atelier.ask("POST", "presets/save", { name, settings: Atelier.form.settings() });
            Atelier.$("preset_form").hidden = true;
            await settings.refreshPresets(name);
            tell("Saved as preset {name}", { name });
        } catch (error) {
            refuse(error);
        }
    }

    async function deletePreset() {
        const name = Atelier.$("preset").value;
        await Atelier.ask("POST", "presets/delete", { name });
        await settings.refreshPresets();
        tell("Deleted preset {name}", { name });
    }

    // ------------------------------------------------------------ settings files

    settings.refreshFiles = async () => {
        const names = (await Atelier.ask("GET", "settings")).files;
        const list = Atelier.$("settings_file");
        const first = new Option(Atelier.t(names.length ? "Settings files" : "No settings file yet"), "");
        list.replaceChildren(first, ...names.map((name) => new Option(name, name)));
    };

    async function loadFile(name) {
        if (!name) return;
        try {
            const path = name.split("/").map(encodeURIComponent).join("/");
            use(await Atelier.ask("GET", "settings/" + path), name);
        } catch (error) {
            refuse(error);
        }
    }

    async function saveFile() {
        try {
            const answer = await Atelier.ask("POST", "settings/save", { settings: Atelier.form.settings() });
            await settings.refreshFiles();
            tell("Wrote {name}", { name: answer.name });
        } catch (error) {
            refuse(error);
        }
    }

    // ------------------------------------------------------------ dropped files

    /** The metadata in the head of a safetensors file (8 bytes of length, then JSON), as a header of its own. */
    async function metadataOf(file) {
        const length = Number(new DataView(await file.slice(0, 8).arrayBuffer()).getBigUint64(0, true));
        if (length > LARGEST_HEADER || length > file.size) throw new Error(Atelier.t("This is no safetensors file."));
        const header = JSON.parse(await file.slice(8, 8 + length).text());
        return JSON.stringify({ __metadata__: header.__metadata__ || {} });
    }

    /** Fill the form from a file: settings JSON, or the job in a LoRA's metadata. */
    settings.readFile = async (file) => {
        try {
            const isLora = file.name.toLowerCase().endsWith(".safetensors");
            if (!isLora && file.size > LARGEST_JSON) throw new Error(Atelier.t("This is larger than any settings file."));
            const text = isLora ? await metadataOf(file) : await file.text();
            use(await Atelier.ask("POST", "settings/read", { text }), file.name);
        } catch (error) {
            refuse(error);
        }
    };

    /** Make an element a place to drop files on; `take` gets the first one. A drop nowhere else reaches the WebUI. */
    settings.dropOn = (element, take) => {
        for (const kind of ["dragenter", "dragover"]) {
            element.addEventListener(kind, (event) => {
                event.preventDefault();
                event.stopPropagation();
                event.dataTransfer.dropEffect = "copy";
                element.classList.add("atelier-over");
            });
        }
        element.addEventListener("dragleave", (event) => {
            if (!element.contains(event.relatedTarget)) element.classList.remove("atelier-over");
        });
        element.addEventListener("drop", (event) => {
            event.preventDefault();
            event.stopPropagation();
            element.classList.remove("atelier-over");
            const file = event.dataTransfer.files[0];
            if (file) take(file);
        });
    };

    // ------------------------------------------------------------ pictures for a field

    function asBase64(file) {
        return new Promise((done, failed) => {
            const reader = new FileReader();
            reader.onload = () => done(reader.result.slice(reader.result.indexOf(",") + 1));
            reader.onerror = () => failed(reader.error);
            reader.readAsDataURL(file);
        });
    }

    async function takePicture(button, file) {
        const input = document.getElementById(button.dataset.pictureFor);
        const words = button.querySelector("span");
        try {
            const answer = await Atelier.ask("POST", "upload", { name: file.name, data: await asBase64(file) });
            input.value = answer.path;
            input.dispatchEvent(new Event("input", { bubbles: true }));
            const shown = button.querySelector("img");
            if (shown) {
                if (shown.src.startsWith("blob:")) URL.revokeObjectURL(shown.src);
                shown.src = URL.createObjectURL(file);
                shown.hidden = false;
            }
            Atelier.say(words, "{name}", { name: file.name });
        } catch (error) {
            Atelier.say(words, error.message);
        }
    }

    function choose(accept, take) {
        const picker = document.createElement("input");
        picker.type = "file";
        picker.accept = accept;
        picker.addEventListener("change", () => picker.files[0] && take(picker.files[0]));
        picker.click();
    }

    async function openFolder(button) {
        const note = noteNear(button);
        try {
            await Atelier.ask("POST", "open", { folder: button.dataset.open });
        } catch (error) {
            if (note === Atelier.$("drop")) tell(error.message);
            else Atelier.say(note, error.message);
        }
    }

    settings.start = () => {
        const { $, onClick } = Atelier;
        $("preset").addEventListener("change", (event) => settings.loadPreset(event.target.value));
        onClick($("preset_load"), () => settings.loadPreset($("preset").value), $("drop"));
        onClick($("preset_refresh"), () => settings.refreshPresets(), $("drop"));
        onClick($("preset_delete"), deletePreset, $("drop"));
        $("preset_save").addEventListener("click", () => {
            $("preset_form").hidden = !$("preset_form").hidden;
            $("preset_name").value = own.includes($("preset").value) ? $("preset").value : "";
            $("preset_name").focus();
        });
        $("preset_form").addEventListener("submit", savePreset);
        $("preset_form").addEventListener("keydown", (event) => {
            if (event.key === "Escape") $("preset_form").hidden = true;
        });
        $("settings_file").addEventListener("change", (event) => loadFile(event.target.value));
        onClick($("settings_save"), saveFile, $("drop"));
        $("drop").addEventListener("click", () => $("file").click());
        $("file").addEventListener("change", (event) => {
            if (event.target.files[0]) settings.readFile(event.target.files[0]);
            event.target.value = "";
        });
        settings.dropOn($("bar"), settings.readFile);
        for (const button of Atelier.root().querySelectorAll("[data-picture-for]")) {
            const take = (file) => takePicture(button, file);
            button.addEventListener("click", () => choose("image/*", take));
            settings.dropOn(button, take);
        }
        for (const button of Atelier.root().querySelectorAll("[data-open]")) {
            onClick(button, openFolder);
        }
    };

    function noteNear(button) {
        const card = button.closest(".atelier-card, .atelier-bar");
        if (!card || card.id === "atelier_bar") return Atelier.$("drop");
        return card.id === "atelier_live" ? Atelier.$("result_text") : card.querySelector("[role=status], .atelier-note");
    }
})();
