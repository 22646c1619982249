/* What all scripts of the tab share: finding elements, asking the routes, words in the chosen language, numbers. */
(function () {
    "use strict";

    const Atelier = (window.Atelier = window.Atelier || {});
    const BASE = "atelier/v1/";
    const originals = new WeakMap();
    let words = {};

    /** The element with the id atelier_<name>. */
    function $(name) {
        return document.getElementById("atelier_" + name);
    }

    function root() {
        return $("root");
    }

    /** An answer that is not what was asked for: `problems` and `warnings` as the routes give them. */
    class Refused extends Error {
        constructor(status, answer) {
            super(answer.error || "");
            this.status = status;
            this.problems = answer.problems || [];
            this.warnings = answer.warnings || [];
        }
    }

    async function answerOf(response) {
        const text = await response.text();
        let answer = {};
        try {
            answer = text ? JSON.parse(text) : {};
        } catch {
            answer = { error: text.slice(0, 300) };
        }
        if (response.ok) return answer;
        if (!answer.error) {
            const known = { 401: t("Log in to the WebUI first."), 404: t("This is not there.") };
            answer = { error: known[response.status] || t("The WebUI answered {n}.", { n: response.status }) };
        }
        throw new Refused(response.status, answer);
    }

    /** Ask a route: JSON there, JSON back. Throws Refused. */
    async function ask(method, path, body) {
        const options = { method, credentials: "same-origin", cache: "no-store", headers: {} };
        if (method === "POST") {
            options.headers["Content-Type"] = "application/json";
            options.body = JSON.stringify(body === undefined ? {} : body);
        }
        let response;
        try {
            response = await fetch(BASE + path, options);
        } catch {
            throw new Refused(0, { error: t("The WebUI does not answer. It may be restarting.") });
        }
        return answerOf(response);
    }

    /** A text in the chosen language, with {names} filled in. */
    function t(text, values) {
        const found = words[text] || text;
        return values ? found.replace(/\{(\w+)\}/g, (all, name) => (name in values ? values[name] : all)) : found;
    }

    /** Put a text into an element so that it changes with the language. */
    function say(element, text, values) {
        element._said = [text, values];
        element.dataset.said = "";
        const full = text ? t(text, values) : "";
        if (element.textContent !== full) element.textContent = full;
    }

    function translateText(node) {
        if (node.parentElement && node.parentElement.closest("[data-said], [data-plain], option[value]")) return;
        if (!originals.has(node)) originals.set(node, node.data);
        const original = originals.get(node);
        const key = original.trim();
        if (key) node.data = original.replace(key, () => t(key));
    }

    function translateAttributes(element) {
        const names = ["title", "placeholder", "aria-label"].filter((name) => element.hasAttribute(name));
        if (!names.length) return;
        if (!originals.has(element)) {
            originals.set(element, Object.fromEntries(names.map((name) => [name, element.getAttribute(name)])));
        }
        const known = originals.get(element);
        for (const name of names) if (name in known) element.setAttribute(name, t(known[name]));
    }

    /** Put everything below a node into the chosen language. */
    function translate(node) {
        const walker = document.createTreeWalker(node, NodeFilter.SHOW_TEXT | NodeFilter.SHOW_ELEMENT);
        for (let at = node; at; at = walker.nextNode()) {
            if (at.nodeType === Node.TEXT_NODE) translateText(at);
            else if (at._said) say(at, ...at._said);
            else if (at.nodeType === Node.ELEMENT_NODE) translateAttributes(at);
        }
    }

    /** Choose "en" or "ja". A WebUI that translates its page has put its words into window.localization. */
    async function setLanguage(language) {
        const hosts = window.localization || {};
        const translated = Object.keys(hosts).length > 0;
        $("languages").hidden = translated;
        if (translated) {
            words = hosts;
        } else {
            words = language === "ja" ? await ask("GET", "assets/ja_JP.json").catch(() => ({})) : {};
            root().lang = language;
            for (const button of $("languages").children) {
                button.setAttribute("aria-pressed", String(button.dataset.language === language));
            }
        }
        translate(root());
        document.dispatchEvent(new CustomEvent("atelier:language"));
    }

    /** A number as people read it: four digits that count, 1e-4 where it is small. */
    function number(value) {
        if (value === null || value === undefined || !Number.isFinite(value)) return "–";
        const size = Math.abs(value);
        if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace("e+", "e");
        return String(Number(value.toPrecision(4)));
    }

    /** Seconds as 0:07, 12:34 or 1:02:03. */
    function duration(seconds) {
        if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
        const whole = Math.max(Math.round(seconds), 0);
        const two = (value) => String(value).padStart(2, "0");
        const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
        return hours ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`;
    }

    /** Megabytes as a number of gigabytes. */
    function gigabytes(megabytes) {
        return (megabytes / 1024).toFixed(megabytes < 10240 ? 1 : 0);
    }

    /** A copy of a template's content, in the chosen language. */
    function copyOf(name) {
        const copy = $("template_" + name).content.firstElementChild.cloneNode(true);
        translate(copy);
        return copy;
    }

    /** Run `action` when the button is pressed; while it runs the button is off. An error goes to `note`. */
    function onClick(button, action, note) {
        button.addEventListener("click", async () => {
            const able = !button.disabled;
            button.disabled = true;
            try {
                await action(button);
            } catch (error) {
                if (!(error instanceof Refused)) console.error(error);
                if (note) say(note, error.message);
            } finally {
                if (able) button.disabled = false;
            }
        });
    }

    /** Whether anybody can see the tab: the window is in front and the WebUI shows our tab. */
    function isSeen() {
        const here = root();
        return Boolean(here) && "ready" in here.dataset && document.visibilityState === "visible" && here.getClientRects().length > 0;
    }

    /** What the browser remembers of this tab under a name (per window when `session`); a blocked store forgets. */
    function remember(name, value, session) {
        try {
            (session ? sessionStorage : localStorage).setItem("atelier_" + name, JSON.stringify(value));
        } catch {
            /* private windows refuse */
        }
    }

    function recall(name, session) {
        try {
            return JSON.parse((session ? sessionStorage : localStorage).getItem("atelier_" + name));
        } catch {
            return null;
        }
    }

    Object.assign(Atelier, {
        $, root, ask, t, say, translate, setLanguage, number, duration, gigabytes, copyOf, onClick, isSeen,
        remember, recall, Refused, BASE,
    });
})();
