// Live pages: the page is asked for again, and what has changed in its regions marked data-live is put in place.
"use strict";

const lorot = (() => {
  const shown = new Map();
  const announcer = document.getElementById("announce");
  const stale = document.getElementById("stale");

  const regions = (page) => [...page.querySelectorAll("[data-live][id]")];

  // What the server has sent, not what the page has become: an opened <details> is no change.
  for (const region of regions(document)) shown.set(region.id, region.outerHTML);

  function put(fresh, region) {
    const focused = region.contains(document.activeElement) ? document.activeElement.id : null;
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
    if (focused !== null) {
      const again = focused && document.getElementById(focused);
      (again || document.getElementById("main")).focus({ preventScroll: true });
    }
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
  }

  async function ask(address, options) {
    const response = await fetch(address, { credentials: "same-origin", ...options });
    // The session has ended: the page that was asked for leads to the login.
    if (response.redirected && new URL(response.url).pathname.endsWith("/login")) location.reload();
    if (response.status >= 500 || response.status === 429) throw new Error(`answered ${response.status}`);
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

  async function follow() {
    let pause = 1;
    for (;;) {
      const every = Number(document.body.dataset.refresh);
      if (!every) return;
      await new Promise((done) => setTimeout(done, 1000 * every * pause));
      if (document.hidden) await new Promise((done) => document.addEventListener("visibilitychange", done, { once: true }));
      const began = performance.now();
      try {
        const page = await ask(location.href, { signal: AbortSignal.timeout(20000) });
        take(page);
        stale.hidden = true;
        // A service that takes its time is asked less often.
        pause = Math.max(1, (performance.now() - began) / 100 / every);
        if (page.body.dataset.refresh) document.body.dataset.refresh = page.body.dataset.refresh;
        else delete document.body.dataset.refresh;
      } catch {
        stale.hidden = false;
        pause = Math.min(pause * 2, 15);
      }
    }
  }

  setInterval(tellTimes, 10000);
  follow();
  return { ask, take };
})();
