"""The HTTP server. Its event loop never touches torch; the engine's thread never sees HTTP."""
