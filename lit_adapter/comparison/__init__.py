"""Runs side by side: what differs in their configurations, what they reached, and what that cost."""
