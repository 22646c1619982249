/* A mode's own values: taken by themselves where nobody chose others, else offered. */
(function () {
    "use strict";

    const Atelier = (window.Atelier = window.Atelier || {});
    const modes = (Atelier.modes = {});
    const MINE = ["model", "vae", "te", "lora", "folder", "picture", "file"]; // what a text stands for that no preset knows
    let offered = null;

    /** Whether a preset of a mode says nothing of a field: what is trained on, and sizes, which belong to the model. */
    function keeps(field) {
        return field.kind === "mode" || MINE.includes(field.holds) || /^image_/.test(field.attribute);
    }

    /** Give fields the values of a mode; returns those that were there before. */
    function take(settings, which) {
        const before = new Map();
        const second = settings["2nd pass"] || {};
        for (const field of Atelier.form.fields) {
            if (keeps(field) || !which(field)) continue;
            const from = field.second ? second : settings;
            before.set(field, [Atelier.form.read(field), field.touched]);
            Atelier.form.write(field, field.key in from ? from[field.key] : field.standard);
        }
        Atelier.form.arrange();
        Atelier.form.checkSoon(0);
        return before;
    }

    function giveBack(before) {
        for (const [field, [value, touched]] of before) {
            Atelier.form.write(field, value);
            field.touched = touched;
        }
        Atelier.form.arrange();
        Atelier.form.checkSoon(0);
    }

    function say(text, name, word, action) {
        const { $ } = Atelier;
        $("mode_values").hidden = !text;
        Atelier.say($("mode_values_text"), text, { name });
        Atelier.say($("mode_values_button").querySelector("span"), word);
        offered = action;
    }

    function taken(name, before) {
        const list = Atelier.$("preset");
        const chosen = list.value;
        list.value = name;
        Atelier.settings.invite(); // what was read before is no longer what the form holds
        say("Filled with the values of preset {name}.", name, "Back to the values before", () => {
            giveBack(before);
            list.value = chosen;
            say("", "", "", null);
        });
    }

    async function onMode() {
        const mode = Atelier.form.value("mode");
        say("", "", "", null);
        let answer;
        try {
            answer = await Atelier.ask("GET", "modes/" + encodeURIComponent(mode));
        } catch {
            return; // nothing is offered then
        }
        if (!answer.name || mode !== Atelier.form.value("mode")) return;
        if (Atelier.form.shipped) {
            taken(answer.name, take(answer.settings, (field) => !field.touched));
            return;
        }
        say("This mode has values of its own: preset {name}.", answer.name, "Use them", () => {
            taken(answer.name, take(answer.settings, () => true));
        });
    }

    modes.start = () => {
        Atelier.$("mode").addEventListener("change", onMode);
        Atelier.$("mode_values_button").addEventListener("click", () => offered && offered());
        document.addEventListener("atelier:filled", () => say("", "", "", null));
    };
})();
