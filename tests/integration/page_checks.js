// What a page is looked at for, from within it. Evaluates to an object of functions.
({
  // Every text that can be seen, against what lies behind it (WCAG 2.2, 1.4.3), and the edges of fields (1.4.11).
  contrast() {
    const channel = (value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    };
    const parse = (text) => {
      const found = text.match(/[\d.]+/g).map(Number);
      return found.length < 4 ? [...found, 1] : found;
    };
    const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
    const behind = (element) => {
      for (let one = element; one; one = one.parentElement) {
        const colour = parse(getComputedStyle(one).backgroundColor);
        if (colour[3] === 1) return colour;
        if (colour[3] !== 0) throw new Error(`half transparent: ${one.outerHTML.slice(0, 80)}`);
      }
      return [255, 255, 255, 1];
    };
    const ratio = (a, b) => {
      const [most, least] = [light(a), light(b)].sort((p, q) => q - p);
      return (most + 0.05) / (least + 0.05);
    };
    const wrong = [];
    let seen = 0;
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const text = walker.currentNode.data.trim();
      const element = walker.currentNode.parentElement;
      if (!text || !element.checkVisibility({ visibilityProperty: true })) continue;
      if (["SCRIPT", "STYLE", "title", "OPTION", "PROGRESS"].includes(element.tagName)) continue;
      const style = getComputedStyle(element);
      const size = parseFloat(style.fontSize);
      const least = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700) ? 3 : 4.5;
      const found = ratio(parse(element instanceof SVGElement ? style.fill : style.color), behind(element));
      seen += 1;
      if (found < least) wrong.push(`${found.toFixed(2)} of '${text.slice(0, 30)}' in ${element.outerHTML.slice(0, 60)}`);
    }
    for (const field of document.querySelectorAll("input:not([type=hidden]), select, textarea")) {
      if (!field.checkVisibility()) continue;
      const found = ratio(parse(getComputedStyle(field).borderTopColor), behind(field.parentElement));
      if (found < 3) wrong.push(`${found.toFixed(2)} of the edge of ${field.id}`);
    }
    return { seen, wrong };
  },
  // What can be used or seen, and has no name that assistive programs would say.
  nameless() {
    const all = "a[href], button, input:not([type=hidden]), select, textarea, summary, progress, svg[role=img], img";
    return [...document.querySelectorAll(all)]
      .filter((one) => one.checkVisibility())
      .filter((one) => !one.textContent.trim() && !one.getAttribute("aria-label") && !one.alt && !one.labels?.length)
      .map((one) => one.outerHTML.slice(0, 100));
  },
  // What a finger would miss (WCAG 2.2, 2.5.8).
  small() {
    return [...document.querySelectorAll("button, .button, select, input:not([type=hidden])")]
      .filter((one) => one.checkVisibility() && one.getBoundingClientRect().height < 24)
      .map((one) => one.outerHTML.slice(0, 100));
  },
  // How whatever has the focus shows it.
  focus() {
    const one = document.activeElement;
    const style = getComputedStyle(one);
    return { tag: one.tagName, style: style.outlineStyle, width: parseFloat(style.outlineWidth) };
  },
})
