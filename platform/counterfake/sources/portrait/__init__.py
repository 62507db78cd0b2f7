"""Procedural faces: people.py says who and how, painter.py draws, canvas.py projects, camera.py photographs."""
