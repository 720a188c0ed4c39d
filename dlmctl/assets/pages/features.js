"use strict";
// The page is whole without this: it only hides and reorders what is there.
const index = document.getElementById("index");
const cards = document.getElementById("cards");
const search = document.getElementById("search");
const sort = document.getElementById("sort");
const count = document.getElementById("count");
const entries = [...index.children].map((row, place) => {
  return { row, card: cards.children[place], text: null };
});
if (entries.every((entry) => entry.row.dataset.score === "-1")) {
  sort.querySelector("[value=score]").remove();
}

function filter() {
  const wanted = search.value.toLowerCase();
  let left = 0;
  for (const entry of entries) {
    entry.text ??= entry.card.textContent.toLowerCase();
    const found = /^\d+$/.test(wanted)
      ? entry.row.dataset.feature.startsWith(wanted)
      : entry.text.includes(wanted);
    entry.row.hidden = entry.card.hidden = !found;
    left += found;
  }
  count.textContent = left;
}

function reorder() {
  const key = sort.value;
  const sign = key === "feature" ? 1 : -1;
  entries.sort((a, b) => sign * (a.row.dataset[key] - b.row.dataset[key]));
  index.append(...entries.map((entry) => entry.row));
  cards.append(...entries.map((entry) => entry.card));
}

search.addEventListener("input", filter);
sort.addEventListener("change", reorder);
