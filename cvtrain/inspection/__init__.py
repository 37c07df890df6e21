"""Looking at a data set: duplicates, leaks and statistics, and the page that shows them."""
