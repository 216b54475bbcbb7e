// Live pages: the page is asked for again, and what has changed in its regions marked data-live is put in place.
"use strict";

const lorot = (() => {
  // Between two attempts to reach a service that does not answer.
  const LONGEST_S = 10;
  const shown = new Map();
  const announcer = document.getElementById("announce");
  const stale = document.getElementById("stale");

  const regions = (page) => [...page.querySelectorAll("[data-live][id]")];

  // What the server has sent, not what the page has become: an opened <details> is no change.
  for (const region of regions(document)) shown.set(region.id, region.outerHTML);

  // The same thing in another state of a region: by its id, or as what it says and where it leads.
  function found(one, region) {
    if (one.id) return document.getElementById(one.id);
    const same = (other) => other.textContent === one.textContent && other.getAttribute("href") === one.getAttribute("href");
    return [...region.querySelectorAll(one.localName)].find(same);
  }

  function put(fresh, region) {
    const focused = region.contains(document.activeElement) ? document.activeElement : null;
    const open = [...region.querySelectorAll("details[open][id]")].map((one) => one.id);
    const ticked = [...region.querySelectorAll("input:checked[id]")].map((one) => one.id);
    const said = region.dataset.say;
    const made = document.importNode(fresh, true);
    region.replaceWith(made);
    for (const id of open) made.querySelector(`#${CSS.escape(id)}`)?.setAttribute("open", "");
    for (const id of ticked) {
      const box = made.querySelector(`#${CSS.escape(id)}`);
      if (box) box.checked = true;
    }
    if (focused) (found(focused, made) || document.getElementById("main")).focus({ preventScroll: true });
    if (made.dataset.say && made.dataset.say !== said) announcer.textContent = made.dataset.say;
  }

  // Put what has changed in `page`, another state of this one, in place.
  function take(page) {
    for (const fresh of regions(page)) {
      const region = document.getElementById(fresh.id);
      const text = fresh.outerHTML;
      if (!region || shown.get(fresh.id) === text) continue;
      shown.set(fresh.id, text);
      put(fresh, region);
    }
    if (page.title) document.title = page.title;
    document.dispatchEvent(new CustomEvent("lorot:taken", { detail: page }));
  }

  // Another state of a page; null where that is the one of this version.
  async function ask(address, options) {
    const response = await fetch(address, { credentials: "same-origin", ...options });
    // The session has ended: the page that was asked for leads to the login.
    if (response.redirected && new URL(response.url).pathname.endsWith("/login")) location.reload();
    if (response.status === 304) return null;
    if (response.status === 429) throw new Error("The service is asked too often");
    if (response.status >= 500) throw new Error(`The service answers ${response.status}, an error,`);
    return new DOMParser().parseFromString(await response.text(), "text/html");
  }

  function ago(seconds) {
    for (const [size, unit] of [[86400, "day"], [3600, "h"], [60, "min"]]) {
      if (seconds >= size) {
        const count = Math.floor(seconds / size);
        return `${count} ${unit}${unit === "day" && count > 1 ? "s" : ""} ago`;
      }
    }
    return `${Math.floor(seconds)} s ago`;
  }

  function tellTimes() {
    for (const time of document.querySelectorAll("time[datetime]")) {
      const text = ago(Math.max(0, (Date.now() - Date.parse(time.dateTime)) / 1000));
      if (time.textContent !== text) time.textContent = text;
    }
  }

  // What is shown is not how things are, and why; said once, not at each attempt.
  function warn(why) {
    if (!stale.hidden) return;
    stale.hidden = false;
    stale.textContent = why;
  }

  function calm() {
    if (stale.hidden) return;
    stale.hidden = true;
    announcer.textContent = "The service answers again.";
  }

  async function follow() {
    let pause = 1;
    let failures = 0;
    for (;;) {
      const { refresh, version } = document.body.dataset;
      const every = Number(refresh);
      if (!every) return;
      const seconds = failures ? Math.max(every, Math.min(every * 2 ** failures, LONGEST_S)) : every * pause;
      await new Promise((done) => setTimeout(done, 1000 * seconds));
      if (document.hidden) await new Promise((done) => document.addEventListener("visibilitychange", done, { once: true }));
      const began = performance.now();
      try {
        const headers = version ? { "If-None-Match": `"${version}"` } : {};
        const page = await ask(location.href, { headers, signal: AbortSignal.timeout(20000) });
        failures = 0;
        pause = 1;
        if (!page) { calm(); continue; }
        const refusal = page.querySelector("main > .reason");
        calm();
        if (refusal) { warn(`This page is not renewed any more: ${refusal.textContent}`); return; }
        take(page);
        // A service that takes its time is asked less often.
        pause = Math.max(1, (performance.now() - began) / 100 / every);
        for (const name of ["refresh", "version"]) {
          if (page.body.dataset[name]) document.body.dataset[name] = page.body.dataset[name];
          else delete document.body.dataset[name];
        }
      } catch (error) {
        const why = error.name === "Error" ? error.message : "The service does not answer";
        warn(`${why} since ${new Date().toLocaleTimeString()}; what is shown is from before. It is asked again by itself.`);
        failures += 1;
      }
    }
  }

  setInterval(tellTimes, 10000);
  follow();
  return { ask, take };
})();
