"use strict";
// What the page does beyond standing there: sort tables, filter queries, read values off curves. All of it is optional.
(() => {
  const each = (what, act, where = document) => where.querySelectorAll(what).forEach(act);

  const key = (cell) => {
    const text = cell.dataset.v ?? cell.textContent.trim();
    const value = Number(text.replace(/[, +%]/g, "").replace("\u2212", "-"));
    return text !== "" && !Number.isNaN(value) ? value : text;
  };
  const sort = (table, column, head) => {
    const rising = head.getAttribute("aria-sort") === "descending";
    each("th", (other) => other.removeAttribute("aria-sort"), table);
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const body = table.tBodies[0];
    const compare = (a, b) => {
      const [x, y] = [key(a.cells[column]), key(b.cells[column])];
      const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
      return rising ? order : -order;
    };
    [...body.rows].sort(compare).forEach((row) => body.append(row));
  };
  each("table.sortable", (table) => {
    each("thead th", (head) => {
      head.tabIndex = 0;
      head.title = "Sort by this column";
      const act = () => sort(table, head.cellIndex, head);
      head.addEventListener("click", act);
      head.addEventListener("keydown", (event) => {
        if (event.key === "Enter" || event.key === " ") { event.preventDefault(); act(); }
      });
    }, table);
  });

  each("[data-choose]", (box) => {
    const group = box.dataset.choose;
    const input = box.querySelector("input");
    const buttons = [...box.querySelectorAll("button")];
    let kind = buttons.length ? buttons[0].value : null;
    const show = () => {
      const wanted = (input ? input.value : "").toLowerCase();
      let count = 0;
      each(`[data-group="${group}"]`, (item) => {
        item.hidden = (kind !== null && item.dataset.kind !== kind) || !item.textContent.toLowerCase().includes(wanted);
        count += item.hidden ? 0 : 1;
      });
      const empty = document.querySelector(`[data-empty="${group}"]`);
      if (empty) empty.hidden = count > 0;
      buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.value === kind)));
    };
    if (input) input.addEventListener("input", show);
    buttons.forEach((button) => button.addEventListener("click", () => { kind = button.value; show(); }));
    box.hidden = false;
    show();
  });

  const SVG = "http://www.w3.org/2000/svg";
  const format = (value) => Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
  each("svg[data-lines]", (svg) => {
    const data = JSON.parse(svg.dataset.lines);
    const [left, top, width, height, low, high, yLow, yHigh, fullWidth] = data.frame;
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    svg.parentNode.append(tip);
    const cross = document.createElementNS(SVG, "line");
    cross.setAttribute("class", "cross");
    cross.setAttribute("y1", top);
    cross.setAttribute("y2", top + height);
    cross.style.visibility = "hidden";
    svg.append(cross);
    const dots = data.series.map((_, i) => {
      const dot = document.createElementNS(SVG, "circle");
      dot.setAttribute("class", `dot c${i % 6}`);
      dot.setAttribute("r", 4);
      dot.style.visibility = "hidden";
      svg.append(dot);
      return dot;
    });
    const leave = () => {
      tip.hidden = true;
      [cross, ...dots].forEach((part) => { part.style.visibility = "hidden"; });
    };
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = low + (high - low) * ((event.clientX - box.left) * fullWidth / box.width - left) / width;
      const nearest = data.series.map((one) => one.points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
      const middle = nearest.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a)[0];
      const px = left + width * (middle - low) / (high - low);
      cross.setAttribute("x1", px);
      cross.setAttribute("x2", px);
      cross.style.visibility = "visible";
      const rows = [`${data.x} ${format(middle)}`];
      nearest.forEach((point, i) => {
        const near = Math.abs(point[0] - middle) <= (high - low) / 20;
        dots[i].style.visibility = near ? "visible" : "hidden";
        if (!near) return;
        dots[i].setAttribute("cx", left + width * (point[0] - low) / (high - low));
        dots[i].setAttribute("cy", top + height * (1 - (point[1] - yLow) / (yHigh - yLow)));
        rows.push(`${data.series[i].name} ${format(point[1])}`);
      });
      tip.replaceChildren(...rows.map((row) => { const line = document.createElement("div"); line.textContent = row; return line; }));
      tip.hidden = false;
      const place = px * box.width / fullWidth;
      tip.style.top = `${svg.offsetTop + 6}px`;
      tip.style.left = `${place > box.width / 2 ? place - tip.offsetWidth - 10 : place + 10}px`;
    });
  });
})();
