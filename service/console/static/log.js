// The live log of a job: server-sent events, kept at the end unless somebody has scrolled up or paused it.
"use strict";

(() => {
  const log = document.getElementById("log");
  const note = document.getElementById("log-note");
  const button = document.getElementById("log-pause");
  const choice = document.getElementById("log-choice");
  const MOST_LINES = 5000;
  const EVERY_MS = 100;
  // Terminal escapes, then other controls and marks of the writing direction.
  const ESCAPES = /\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])?|\x9b[0-?]*[ -/]*[@-~]/g;
  const CONTROLS = /[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g;
  let source = null;
  let paused = false;
  let ended = log.dataset.following !== "yes";
  // Another one once the job was retried or resumed.
  let turn = log.dataset.turn;
  // What has come while it was paused, and what is to be shown next.
  let waiting = [];
  let arrived = [];
  // Lines that are shown, and in `arrived`.
  let lines = 0;
  let coming = 0;
  let due = 0;

  choice.addEventListener("change", () => choice.requestSubmit());

  const atEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  const toEnd = () => { log.scrollTop = log.scrollHeight; };
  toEnd();

  const count = (text) => text.split("\n").length;

  // A program may write faster than a page is drawn: what has come is put in place at once, and no more than is kept.
  function show(texts) {
    for (const text of texts) { arrived.push(text); coming += count(text); }
    while (arrived.length > 1 && coming - count(arrived[0]) >= MOST_LINES) coming -= count(arrived.shift());
    if (!due) due = setTimeout(put, EVERY_MS);
  }

  function put() {
    clearTimeout(due);
    due = 0;
    const stay = atEnd();
    log.append(...arrived.map((text) => {
      const piece = document.createElement("span");
      piece.textContent = `${text.replace(ESCAPES, "").replace(CONTROLS, "\ufffd")}\n`;
      return piece;
    }));
    lines += coming;
    arrived = [];
    coming = 0;
    while (lines > MOST_LINES && log.firstChild !== log.lastChild) {
      lines -= count(log.firstChild.textContent) - 1;
      log.firstChild.remove();
    }
    if (stay) toEnd();
  }

  function empty() {
    log.replaceChildren();
    waiting = [];
    arrived = [];
    lines = 0;
    coming = 0;
  }

  function add(text) {
    if (!paused) { show([text]); return; }
    waiting.push(text);
    if (waiting.length > MOST_LINES) waiting.shift();
    note.textContent = `Paused; ${waiting.length} more ${waiting.length === 1 ? "piece" : "pieces"} since.`;
  }

  function stop() {
    source?.close();
    source = null;
  }

  function start() {
    if (ended || source) return;
    const address = new URL(log.dataset.url, location.href);
    // Without an attempt, the log goes on with the next one.
    address.searchParams.delete("attempt");
    address.searchParams.set("follow", "true");
    address.searchParams.set("tail", "200");
    let fresh = true;
    source = new EventSource(address);
    source.onopen = () => {
      button.hidden = false;
      if (!paused) note.textContent = "Live.";
      if (fresh) empty();
      fresh = false;
    };
    source.onmessage = (event) => add(event.data);
    source.addEventListener("attempt", (event) => {
      const number = JSON.parse(event.data).attempt;
      if (number > 1) add(`--- attempt ${number} ---`);
    });
    source.addEventListener("problem", (event) => {
      note.textContent = JSON.parse(event.data).message;
      ended = true;
      stop();
    });
    source.addEventListener("end", (event) => {
      const end = JSON.parse(event.data);
      note.textContent = `The job is ${end.state}; this was its last word.`;
      ended = true;
      button.hidden = true;
      button.textContent = "Pause";
      paused = false;
      show(waiting.splice(0));
      stop();
    });
    source.onerror = () => {
      if (!ended) note.textContent = "The log does not come through just now; trying again.";
      // Refused, not interrupted: the browser does not try that again by itself.
      if (source && source.readyState === EventSource.CLOSED) { stop(); setTimeout(() => { if (!document.hidden) start(); }, 5000); }
    };
  }

  button.addEventListener("click", () => {
    paused = !paused;
    button.textContent = paused ? "Go on" : "Pause";
    if (!paused) { show(waiting.splice(0)); put(); toEnd(); note.textContent = "Live."; }
  });
  // A browser has few connections to a service; a page that nobody sees needs none. Where somebody has scrolled up to
  // read, the lines stay: a new connection would begin with the last ones.
  document.addEventListener("visibilitychange", () => { if (!document.hidden) start(); else if (!paused && atEnd()) stop(); });
  // The page's own state is asked for rarely; this tells when it is another one.
  document.addEventListener("lorot:taken", (event) => {
    const fresh = event.detail.getElementById("log");
    if (!fresh || fresh.dataset.turn === turn) return;
    turn = fresh.dataset.turn;
    // Who reads an earlier attempt goes on reading it.
    const isChosen = new URL(location.href).searchParams.has("attempt");
    if (!ended || (isChosen && fresh.dataset.following !== "yes")) return;
    ended = false;
    start();
  });
  start();
})();
