"""Reports on finished or running trainings: reads run folders as data, writes tables, plots and HTML."""
