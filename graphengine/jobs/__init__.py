"""Offline dataset jobs: stream in, stream out, survive anything, resume exactly."""
