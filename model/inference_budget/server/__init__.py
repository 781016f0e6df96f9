"""Completions over HTTP, as OpenAI's clients ask for them. Needs the extra `serve`.

What a request means is `completions`, what its tokens read like is `text`; `worker` runs the engine, `app` answers, and
`process` is what `python -m inference_budget serve` runs.
"""
