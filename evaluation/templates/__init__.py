"""The pages' templates: base.html is what evaluation and scan reports share."""
