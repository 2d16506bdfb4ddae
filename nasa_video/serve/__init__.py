"""The live page and its server: streams over a WebSocket, jobs over HTTP, one worker for all."""
