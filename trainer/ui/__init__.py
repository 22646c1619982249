"""The tab as users meet it: the form made from the table, the page, its routes, the plot and picture tools."""
