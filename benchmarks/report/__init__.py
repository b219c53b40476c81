"""What a result looks like: Markdown and charts."""
