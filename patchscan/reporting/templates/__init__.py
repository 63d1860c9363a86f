"""What all pages share: base.html, its style and its script."""
