// The submit form is looked at while somebody types, by the service's own rules; and it is sent once.
"use strict";

(() => {
  const form = document.getElementById("submission");
  const status = document.getElementById("typing");
  const kind = document.getElementById("kind");
  const base = document.getElementById("base");
  let timer = 0;
  let asking = null;

  // `form.action` would be the buttons of that name.
  async function look(action, again = false) {
    clearTimeout(timer);
    asking?.abort();
    const own = asking = new AbortController();
    const body = new URLSearchParams(new FormData(form));
    body.set("action", action);
    // What is tried again by itself is not told each time.
    if (!again) status.textContent = action === "check" ? "Working out steps, memory and storage …" : "Checking …";
    try {
      const page = await lorot.ask(`${form.getAttribute("action")}/look`, { method: "POST", body, signal: own.signal });
      if (!page.getElementById("verdict")) {
        // The session has ended, or it is too long: another page, or none.
        const refusal = page.querySelector("main > .reason")?.textContent;
        status.textContent = `The service does not look at this form${refusal ? `: ${refusal}` : "."} What was found is from before.`;
        return;
      }
      lorot.take(page);
      mark();
      status.textContent = "";
      if (document.getElementById("verdict").dataset.state === "right") timer = setTimeout(look, 1200, "check");
    } catch (error) {
      if (error.name === "AbortError") return;
      const why = error.name === "Error" ? error.message : "The service does not answer";
      const told = `${why}; what was found may be old. It is asked again by itself.`;
      if (status.textContent !== told) status.textContent = told;
      timer = setTimeout(look, 5000, action, true);
    }
  }

  function mark() {
    for (const told of form.querySelectorAll("[id^=wrong-]")) {
      const field = form.elements[told.id.slice("wrong-".length)];
      if (!field) continue;
      if (told.textContent) field.setAttribute("aria-invalid", "true");
      else field.removeAttribute("aria-invalid");
      if (told.textContent && told.closest("details")) told.closest("details").open = true;
    }
  }

  function soon() {
    clearTimeout(timer);
    timer = setTimeout(look, 450, "validate");
  }

  form.addEventListener("input", (event) => {
    if (event.target === base && base.selectedOptions[0].dataset.kind) kind.value = base.selectedOptions[0].dataset.kind;
    soon();
  });
  form.addEventListener("submit", (event) => {
    if (event.submitter?.value === "check") {
      event.preventDefault();
      look("check");
      return;
    }
    clearTimeout(timer);
    asking?.abort();
    status.textContent = "Submitting …";
    // After the form has been read: what is disabled is not sent.
    setTimeout(() => { document.getElementById("send").disabled = true; });
  });
  window.addEventListener("pageshow", (event) => {
    document.getElementById("send").disabled = false;
    if (event.persisted) status.textContent = "";
  });
  look("validate");
})();
