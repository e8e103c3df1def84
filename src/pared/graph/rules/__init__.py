"""What each family of operators does to labels."""

from pared.graph.rules.table import Rule, rule_for, unknown, unlabelled

__all__ = ["Rule", "rule_for", "unknown", "unlabelled"]
