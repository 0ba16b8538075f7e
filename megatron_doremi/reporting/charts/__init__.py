"""Charts of a report as Vega-Lite specifications, and their rendering as SVG, PNG and interactive script."""
