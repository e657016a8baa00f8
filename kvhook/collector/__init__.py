"""The collector: one object to poll around ``llm.generate()``, over kvhook's recording, the engine's own objects and
the Prometheus registry."""

from kvhook.collector.collector import VLLMMetricsCollector

__all__ = ["VLLMMetricsCollector"]
