"""The page of a scan; its base.html is in patchscan.reporting."""
