"""Every Prometheus metric of the server; `page` says how they are fed and rendered."""

from serve.metrics.exposition import METRICS_TYPE
from serve.metrics.names import MAX_ADAPTER_SERIES, MAX_LABEL_BYTES
from serve.metrics.page import Metrics
from serve.metrics.request_meter import RequestMeter

__all__ = ["MAX_ADAPTER_SERIES", "MAX_LABEL_BYTES", "METRICS_TYPE", "Metrics", "RequestMeter"]
