"""Kubernetes: what the port range means there, as named container ports and a PodMonitor.

https://prometheus-operator.dev/docs/api-reference/api/#monitoring.coreos.com/v1.PodMonitor
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from django_promports.targets import quote


def dump_kubernetes(
    name: str, ports: Sequence[int], *, labels: Mapping[str, str], worker: bool, scheme: str, secret: bool
) -> Iterator[bytes]:
    """Yield the named ports of the container, and a PodMonitor that scrapes each of them in every pod of this name.

    labels: of every target. worker: label each with its place in the range. secret: send the token that is in a secret.
    """

    def lines() -> Iterator[str]:
        yield "# Into the container, in the template of the pods:\nports:\n"
        yield from (f"  - {{name: metrics-{port}, containerPort: {port}}}\n" for port in ports)
        yield "---\n# Beside it; the selector is that of your pods.\n"
        yield "apiVersion: monitoring.coreos.com/v1\nkind: PodMonitor\n"
        yield f"metadata:\n  name: {quote(name)}\nspec:\n"
        yield f"  selector:\n    matchLabels:\n      app.kubernetes.io/name: {quote(name)}\n  podMetricsEndpoints:\n"
        for place, port in enumerate(ports):
            yield f"    - port: metrics-{port}\n      path: /metrics\n      scheme: {scheme}\n"
            if secret:
                yield f"      authorization:\n        credentials: {{name: {name}-metrics, key: token}}\n"
            if targeted := {**labels, **({"worker": str(place)} if worker else {})}:
                yield "      relabelings:\n"
            for label, value in targeted.items():
                replacement = quote(value.replace("$", "$$"))  # a single one begins a reference
                yield f"        - {{targetLabel: {quote(label)}, replacement: {replacement}}}\n"

    return (line.encode() for line in lines())
