"""Kubernetes: the port range as named ports of a container, and the PodMonitor that scrapes them.

https://prometheus-operator.dev/docs/api-reference/api/#monitoring.coreos.com/v1.PodMonitor
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from django_promports.targets import quote


def dump_kubernetes(
    name: str, ports: Sequence[int], *, labels: Mapping[str, str], worker: bool, scheme: str, secret: bool
) -> Iterator[bytes]:
    """Yield the named ports of the container, and a PodMonitor that scrapes each of them in every pod of this name.

    labels: of every target. worker: add a `worker` label, the index of the port in the range. secret: send the bearer
    token, which is in a Kubernetes secret.
    """

    def lines() -> Iterator[str]:
        yield "# Add this to the container in the pod template:\nports:\n"
        yield from (f"  - {{name: metrics-{port}, containerPort: {port}}}\n" for port in ports)
        yield "---\n# Apply this; its selector must match your pods.\n"
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
                replacement = quote(value.replace("$", "$$"))  # a single $ starts a reference to a group
                yield f"        - {{targetLabel: {quote(label)}, replacement: {replacement}}}\n"

    return (line.encode() for line in lines())
