"""The queries of `docs/grafana_dashboard.json`, held against a page of `/metrics`."""

import json
from pathlib import Path

import promql_parser
from prometheus_client.parser import text_string_to_metric_families

DASHBOARD = Path(__file__).resolve().parents[1] / "docs" / "grafana_dashboard.json"
# Prometheus gives them to every series of a server that it reads.
_OF_PROMETHEUS = {"instance", "job"}


def queries(row: str = "") -> list[str]:
    """PromQL of all panels, or of those below the row whose title begins so."""
    found, title = [], ""
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        if panel["type"] == "row":
            title = panel["title"]
        elif title.startswith(row):
            # A variable of Grafana's, of which Prometheus sees the value.
            found += [t["expr"].replace("$__rate_interval", "5m") for t in panel["targets"]]
    assert found, row
    return found


def unanswered(query: str, page: str) -> list[str]:
    """What a query names that a page of `/metrics` does not have: series, and labels of them."""
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    missing: list[str] = []
    named: set[str] = set()
    grouped: set[str] = set()

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            if node.name not in labels:
                missing.append(node.name)
                return
            named.update(labels[node.name])
            asked = {matcher.name for matcher in node.matchers.matchers}
            missing.extend(sorted(asked - labels[node.name] - _OF_PROMETHEUS))
        elif isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            grouped.update(node.modifier.labels)

    promql_parser.walk(promql_parser.parse(query), visit)
    return missing + sorted(grouped - named - _OF_PROMETHEUS)
