"""The OpenAI-compatible HTTP surface: requests in, tokens to the engine, text back. Knows no graph and no engine.

`pipeline.Pipeline` turns requests into tokens and back, `app.create_app` and `server.HttpServer` put it on HTTP,
`settings` and `card` say how. Nothing is imported here, so that a configuration is read without a web framework.
"""
