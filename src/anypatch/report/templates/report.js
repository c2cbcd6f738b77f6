"use strict";
(function () {
  const slider = document.getElementById("patch");
  if (!slider) return;
  const rows = document.getElementById("rows").children;

  function lines(height, width) {
    let path = "";
    for (let x = 1; x < width; x++) path += "M" + x + " 0V" + height;
    for (let y = 1; y < height; y++) path += "M0 " + y + "H" + width;
    return path;
  }

  function show() {
    const index = slider.value;
    const row = rows[index].dataset;
    document.getElementById("size").textContent = row.patch;
    document.getElementById("says").textContent = row.says;
    slider.setAttribute("aria-valuetext", "patch size " + row.patch + ": " + row.says);
    for (const sample of document.querySelectorAll(".sample")) {
      for (const button of sample.querySelectorAll("button")) {
        const chosen = button.dataset.index === index;
        button.setAttribute("aria-pressed", chosen);
        if (!chosen) continue;
        const thumb = button.querySelector("img");
        const map = sample.querySelector(".map");
        const [height, width] = thumb.dataset.grid.split(" ");
        map.src = thumb.src;
        map.alt = thumb.alt;
        if (thumb.dataset.photo) sample.querySelector(".photo").src = thumb.dataset.photo;
        const grid = sample.querySelector(".grid");
        grid.setAttribute("viewBox", "0 0 " + width + " " + height);
        grid.firstChild.setAttribute("d", lines(+height, +width));
      }
    }
    for (const mark of document.querySelectorAll("g[data-index], tr[data-index]")) {
      mark.classList.toggle("on", mark.dataset.index === index);
    }
  }

  slider.addEventListener("input", show);
  document.addEventListener("click", function (event) {
    const button = event.target.closest(".thumbs button");
    if (!button) return;
    slider.value = button.dataset.index;
    show();
  });
  show();
})();
