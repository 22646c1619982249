/* Starts the tab once it is in the page, whichever WebUI and whichever version of gradio put it there. */
(function () {
    "use strict";

    const Atelier = (window.Atelier = window.Atelier || {});
    const PARTS = ["form", "modes", "pairs", "ahead", "settings", "queue", "live", "pages"];
    const [STARTING, AGAIN] = [120, 1000]; // tries, milliseconds between them
    let started = null;

    function onKey(event) {
        if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
            // The WebUI listens on the document for the same keys and would draw a picture.
            event.preventDefault();
            event.stopPropagation();
            if (Atelier.pages.current === "train") Atelier.$("start").click();
        } else if (event.key === "Enter" && event.target.matches("input") && event.target.closest("#atelier_form")) {
            event.preventDefault();
        }
    }

    /** The lists of models. A WebUI that starts shows its page before it lets extensions add their routes. */
    async function firstLists() {
        for (let tries = 0; tries < STARTING; tries++) {
            try {
                return await Atelier.form.refreshLists(false);
            } catch (error) {
                if (error.status !== 404 && error.status !== 0) return null;
            }
            await new Promise((done) => setTimeout(done, AGAIN));
        }
        return null;
    }

    async function start(here) {
        started = here;
        here.addEventListener("keydown", onKey);
        const hasDraft = Atelier.form.start();
        Atelier.modes.start();
        Atelier.pairs.start();
        Atelier.settings.start();
        Atelier.queue.start();
        Atelier.pages.start();
        for (const button of Atelier.$("languages").children) {
            button.addEventListener("click", () => {
                Atelier.remember("language", button.dataset.language);
                Atelier.setLanguage(button.dataset.language);
            });
        }
        const lists = await firstLists();
        const own = (navigator.language || "").startsWith("ja") ? "ja" : "en";
        await Atelier.setLanguage(Atelier.recall("language") || own);
        const quiet = () => null;
        await Promise.all([
            Atelier.settings.refreshPresets().catch(quiet),
            Atelier.settings.refreshFiles().catch(quiet),
            Atelier.ahead.markUnserved().catch(quiet),
        ]);
        if (!hasDraft && lists && lists.initial) {
            Atelier.$("preset").value = lists.initial;
            await Atelier.settings.loadPreset(lists.initial);
        } else Atelier.form.checkSoon(0);
        here.dataset.ready = "";
        Atelier.live.start();
    }

    /** The tab may be put into the page later than this script, and once more when the WebUI builds its page anew. */
    function look() {
        const here = document.getElementById("atelier_root");
        if (here && here !== started && PARTS.every((name) => name in Atelier)) start(here);
    }

    new MutationObserver(look).observe(document.documentElement, { childList: true, subtree: true });
    document.addEventListener("DOMContentLoaded", look);
    // Newer gradios put scripts into a page that is ready: the last one may come after the last change of the page.
    document.addEventListener("load", look, true);
    look();
})();
