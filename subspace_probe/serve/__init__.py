"""A guard behind HTTP: the moderation endpoint that OpenAI's clients call. Needs the extra `[serve]`."""
