"""The detection service: Ray Serve deployments behind one FastAPI gateway."""
