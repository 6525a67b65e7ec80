"""Runs side by side: differences of their configurations, results, and cost."""
