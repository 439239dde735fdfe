"""The web demonstration behind `ebt demo --web`: thinking step by step, of text and of pictures. Needs gradio."""
