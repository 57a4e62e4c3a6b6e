// Tables sort by a click on a heading, comparisons of a model become tabs, marks of the charts show what they are.
"use strict";

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    heading.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const descending = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.setAttribute("aria-sort", "none"));
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.value;
      const compare = (a, b) => {
        if (key(a) === undefined || key(b) === undefined) {
          return (key(a) === undefined) - (key(b) === undefined); // missing values stay at the end
        }
        const [x, y] = [Number(key(a)), Number(key(b))];
        const order = Number.isNaN(x) || Number.isNaN(y) ? key(a).localeCompare(key(b)) : x - y;
        return descending ? -order : order;
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}

for (const group of document.querySelectorAll(".tabs")) {
  const panels = [...group.querySelectorAll(":scope > .panel")];
  if (panels.length < 2) continue;
  const bar = document.createElement("div");
  bar.className = "tab-bar";
  bar.setAttribute("role", "group");
  bar.setAttribute("aria-label", "context length");
  const buttons = panels.map((panel) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = panel.dataset.label;
    button.addEventListener("click", () => show(panel));
    return button;
  });
  const show = (chosen) => panels.forEach((panel, i) => {
    panel.classList.toggle("hidden", panel !== chosen);
    buttons[i].setAttribute("aria-pressed", panel === chosen);
  });
  bar.append(...buttons);
  group.prepend(bar);
  show(panels.find((panel) => panel.hasAttribute("data-first")) ?? panels[0]);
}

const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
document.body.append(tip);
document.addEventListener("pointerover", (event) => {
  const mark = event.target.closest?.("svg [role=graphics-symbol][aria-label]:not([aria-roledescription=axis])");
  tip.hidden = !mark;
  if (!mark) return;
  tip.textContent = mark.getAttribute("aria-label");
  const box = mark.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.x + box.width / 2 - tip.offsetWidth / 2), innerWidth - tip.offsetWidth - 8);
  tip.style.left = `${left + scrollX}px`;
  tip.style.top = `${box.y + scrollY - tip.offsetHeight - 8}px`;
});
