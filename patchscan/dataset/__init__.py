"""A data set in GenImage's layout: what is in it (the index), and its fair version (the matched protocol). No torch."""
