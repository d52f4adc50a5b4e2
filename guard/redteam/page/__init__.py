"""The parts of a certificate's page: plain HTML, drawn without script or network."""
