"""One completion from llama-server with a turbo3 cache, and the memory that it saves. Part of demo.sh."""

from __future__ import annotations

from turbokv import data
from turbokv.server import Server

PROMPT = "The river was known to the first settlers as"
CTX = 8192


def kv_mib(log: str) -> float:
    """MiB of the KV cache, from llama.cpp's own log line."""
    line = next(line for line in log.splitlines() if "llama_kv_cache: size =" in line)
    return float(line.split("size =")[1].split("MiB")[0])


def main() -> None:
    size = {}
    for cache in ("f16", "turbo3"):
        arguments = ["--ctx-size", str(CTX), "--parallel", "1", "--cache-type-k", cache, "--cache-type-v", cache]
        arguments += ["--log-verbosity", "4"]  # or the size of an f16 cache is not logged
        with Server(data.MINI, arguments) as server:
            request = {"prompt": PROMPT, "n_predict": 24, "temperature": 0}
            text = server.post("/completion", request)["content"]
            size[cache] = kv_mib(server.log())
        print(f"{cache:7} {PROMPT} ...{text!r}")
    saved = 100 * (1 - size["turbo3"] / size["f16"])
    print(f"KV cache for {CTX} tokens: f16 {size['f16']:.2f} MiB, turbo3 {size['turbo3']:.2f} MiB: {saved:.1f} % saved")


if __name__ == "__main__":
    main()
