"""The ring: bytes on paper (`layout`), one writer (`writer`), any number of readers (`reader`). No lock anywhere."""
