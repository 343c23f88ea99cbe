"""Bytes on disk or on the Hub: locate, read headers, stream, rewrite. Knows no model."""
