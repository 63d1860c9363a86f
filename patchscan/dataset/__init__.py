"""Index and audit a data set in GenImage's layout, and build its fair version (the matched protocol). No torch."""
