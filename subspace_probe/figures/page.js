
"use strict";
// Draws every figure of the page from the JSON beside it. One that cannot be drawn says so and stops no other.
const specs = JSON.parse(document.getElementById("figures").textContent);
const config = {
  responsive: true,
  displaylogo: false,
  typesetMath: false, // a prompt's dollar signs are dollar signs
  showSendToCloud: false, // what is in this page stays in it
  plotlyServerURL: "",
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
};

async function show(place) {
  const spec = specs[place.dataset.figure];
  try {
    await Plotly.newPlot(place, spec.data, spec.layout, config);
  } catch (error) {
    console.error(`figure ${place.dataset.figure}: ${error}`);
    place.textContent = "This figure could not be drawn; its numbers are in the data of this page.";
    place.classList.add("broken");
  }
}

for (const place of document.querySelectorAll(".plot")) {
  show(place);
}

// On paper everything is open and fits the sheet.
window.addEventListener("beforeprint", () => {
  document.querySelectorAll("details").forEach((details) => { details.open = true; });
  document.querySelectorAll(".js-plotly-plot").forEach((plot) => Plotly.Plots.resize(plot));
});
