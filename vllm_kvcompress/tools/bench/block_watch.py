"""The blocks that a server holds, read off its metrics."""

import threading
from typing import Self

from prometheus_client.parser import text_string_to_metric_families

from vllm_kvcompress.tools.serving import RunningServer

INTERVAL = 0.5
"""Seconds between two looks at the metrics."""


class BlockWatch(threading.Thread):
    """Reads a server's metrics twice a second while a `with` block runs.

    Args:
        server: The server.

    Attributes:
        blocks: Most blocks seen in use; 0: none seen.
        pool_blocks: Blocks that can be handed out; None: not known yet.

    """

    def __init__(self, server: RunningServer) -> None:
        super().__init__(daemon=True)
        self.blocks = 0
        self.pool_blocks: int | None = None
        self._server = server
        self._over = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Returns when the last look is over."""
        self._over.set()
        self.join()

    def run(self) -> None:
        """See threading.Thread."""
        while not self._over.wait(INTERVAL):
            text = self._server.get("/metrics")
            if text is not None:
                self.look(text)

    def look(self, text: str) -> None:
        """Take in a page of metrics. Mutates the attributes."""
        usage = 0.0
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "vllm:kv_cache_usage_perc":
                    usage = sample.value
                elif sample.name == "vllm:cache_config_info":
                    # vLLM counts the null block here, and not in the share that is used.
                    self.pool_blocks = int(sample.labels["num_gpu_blocks"]) - 1
        if self.pool_blocks is not None:
            self.blocks = max(self.blocks, round(usage * self.pool_blocks))
