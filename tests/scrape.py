"""What a scrape of `/metrics` says, read as Prometheus reads it."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


class Scrape:
    def __init__(self, text: str) -> None:
        self.families = list(text_string_to_metric_families(text))
        self._samples = [sample for family in self.families for sample in family.samples]

    def named(self, name: str, **labels: str) -> list[Sample]:
        """The samples with these values among their labels."""
        return [s for s in self._samples if s.name == name and labels.items() <= s.labels.items()]

    def value(self, name: str, **labels: str) -> float:
        """Their sum, as PromQL's; 0 without any."""
        return sum(sample.value for sample in self.named(name, **labels))
