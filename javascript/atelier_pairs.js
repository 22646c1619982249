/* Original and target side by side, with where they differ and the bucket they fall into. */
(function () {
    "use strict";

    const Atelier = (window.Atelier = window.Atelier || {});
    const pairs = (Atelier.pairs = {});
    let shown = "";
    let asked = 0;

    /** The values that the pairs follow from; null when the mode has none, or nothing is chosen yet. */
    function keyOf() {
        const { form } = Atelier;
        const fields = form.fields.filter((one) => one.shown && !one.second);
        const named = fields.filter((one) => one.holds === "picture");
        const suffix = fields.find((one) => one.key === "diff_target_name");
        const folder = fields.find((one) => one.holds === "folder");
        const ready = named.length
            ? named.some((one) => form.read(one).trim())
            : suffix && folder && form.read(suffix) && form.read(folder).trim();
        if (!ready) return null;
        const all = fields.filter((one) => one.holds || /^(mode|image_|sub_image|data_|diff_)/.test(one.attribute));
        return JSON.stringify(all.map(form.read));
    }

    function figure(source, text) {
        const item = Atelier.copyOf("figure");
        const picture = item.querySelector("img");
        if (source) picture.src = source;
        else picture.hidden = true;
        picture.alt = text;
        item.querySelector("figcaption").textContent = text;
        return item;
    }

    function row(pair) {
        const { t, number } = Atelier;
        const box = document.createElement("div");
        box.className = "atelier-pair";
        box.append(figure(pair.original, pair.names[0] || t("no original image yet")));
        box.append(figure(pair.target, pair.names[1] || t("no target image yet")));
        if (!pair.difference) return box;
        const times = (size) => size.join("×");
        const words = t("{n} % differ · {size} pixels, bucket {bucket}", {
            n: number(pair.share * 100), size: times(pair.size), bucket: times(pair.bucket),
        });
        box.append(figure(pair.difference, words));
        return box;
    }

    async function look() {
        const { $, say } = Atelier;
        const key = keyOf();
        $("pairs").hidden = key === null;
        $("form").classList.toggle("atelier-with-pairs", key !== null);
        if (key === null || key === shown) return;
        shown = key;
        const mine = ++asked;
        try {
            const answer = await Atelier.ask("POST", "pairs", { settings: Atelier.form.settings() });
            if (mine !== asked) return;
            $("pairs_grid").replaceChildren(...answer.pairs.map(row));
            const more = answer.count > answer.pairs.length;
            if (answer.problem) say($("pairs_note"), "{text}", { text: answer.problem });
            else say($("pairs_note"), more ? "{n} pairs, the first {shown} of them:" : "", { n: answer.count, shown: answer.pairs.length });
        } catch {
            if (mine !== asked) return;
            $("pairs_grid").replaceChildren(); // what is wrong stands at its field
            say($("pairs_note"), "");
        }
    }

    pairs.start = () => document.addEventListener("atelier:checked", look);
})();
