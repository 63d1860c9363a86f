"""The pages of scans; base.html is evaluation's."""
